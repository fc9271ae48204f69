"""Loaders alone, on generated JPEGs: ours and a DataLoader with torchvision's transforms, same augmentation, same cores."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from patchlight.data.loaders import build_loader, dali_is_there
from patchlight.data.policy import CropSpec, selfpatch_policy
from patchlight.data.sources import ImageFolder
from patchlight.data.stored import MOST_PIXELS, Source, as_ppm
from patchlight.usage import FLAT

from .console import wide_console
from .rows import PROVENANCE, Row, provenance, write_rows
from .timing import summarize

POLICY = selfpatch_policy()  # 2 x 224 and 8 x 96
PEER = "torchvision DataLoader, PIL"
PROVIDERS = (PEER, "patchlight torchvision", "patchlight dali", "patchlight dali, DALI's colors")
MODES = ("files", "decoded")  # JPEG files; decoded images in memory
TOLERANCE = 0.1  # how far the mean and the spread of a provider's normalized pixels may be from those of the others
COLUMNS = (
    "provider", "mode", "device", "status", "cores", "batch", "images_per_s", "p20", "p80", "crops_per_s",
    "cpu_ms_per_image", "gpu_busy_percent", "memory_growth_mb", "rounds", "seconds", "images", "dali", *PROVENANCE,
)  # fmt: skip


@dataclass(frozen=True)
class LoaderSuite:
    """What to run."""

    images: int = 256
    """Generated JPEG files of 500 x 375."""
    batch: int = 32
    """Images of a batch."""
    cores: int = 2
    """That each provider may use."""
    seconds: float = 6.0
    """Per provider, mode and round, after the warm-up."""
    rounds: int = 3
    """In which providers take turns."""
    modes: tuple[str, ...] = MODES
    """files: JPEG; decoded: images in memory."""
    providers: tuple[str, ...] = PROVIDERS
    """Only these."""


@dataclass(frozen=True)
class Job:
    """One provider in a process of its own, so that no workers read ahead while another provider is measured."""

    provider: str
    mode: str
    folder: str
    device: str
    suite: LoaderSuite


@dataclass(frozen=True)
class Measurement:
    """What one round of a job gives."""

    images_per_s: float
    cpu_ms_per_image: float
    memory_growth_mb: (
        float  # the most memory of this process in the last third of the time, minus that in the first third
    )
    gpu_busy_percent: float | None
    mean: float  # of the normalized pixels
    spread: float


def measure_loader(
    suite: Annotated[LoaderSuite, FLAT] = LoaderSuite(),
    out: Path = Path("bench/out/loader.csv"),
) -> None:
    """Time the input pipeline alone, with decoding and without.

    Args:
        suite: what to run.
        out: the CSV to write.
    """
    rows = measure(suite)
    write_rows(rows, out, COLUMNS)
    print_loader_rows(rows)
    print(f"rows: {out}")


def measure(suite: LoaderSuite) -> list[Row]:
    """All providers in turn, round after round, all on the same cores; a row per provider and mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [p for p in suite.providers if "dali" not in p or dali_is_there()]
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        write_photos(Path(folder), suite.images)
        jobs = [Job(p, mode, folder, device, suite) for mode in suite.modes for p in chosen]
        found: dict[Job, list[Measurement]] = {job: [] for job in jobs}
        task = progress.add_task("", total=suite.rounds * len(jobs))
        for _ in range(suite.rounds):
            for job in jobs:
                progress.update(task, description=f"{job.provider}, {job.mode}")
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found[job].append(pool.submit(measure_job, job).result())
                progress.advance(task)
    all_measurements = [measurement for rounds in found.values() for measurement in rounds]
    return [build_row(job, rounds, check_pixels(rounds, all_measurements)) for job, rounds in found.items()]


def check_pixels(rounds: list[Measurement], all_measurements: list[Measurement]) -> str:
    """How a provider's pixels differ from all providers' in mean or spread; "ok" if they do not."""
    for name in ("mean", "spread"):
        usual = statistics.median(getattr(measurement, name) for measurement in all_measurements)
        own = statistics.mean(getattr(measurement, name) for measurement in rounds)
        if abs(own - usual) > TOLERANCE:
            return f"{name} of its pixels is {own:.2f}, the others' {usual:.2f}"
    return "ok"


def build_row(job: Job, rounds: list[Measurement], status: str) -> Row:
    speed = summarize([m.images_per_s for m in rounds])
    busy = [m.gpu_busy_percent for m in rounds if m.gpu_busy_percent is not None]
    try:
        dali = version("nvidia-dali-cuda130")
    except PackageNotFoundError:
        dali = ""
    row = {
        "provider": job.provider, "mode": job.mode, "device": job.device, "status": status, "cores": job.suite.cores,
        "batch": job.suite.batch, "rounds": speed.rounds, "seconds": job.suite.seconds, "images": job.suite.images,
        **provenance(job.device), "dali": dali, "threads": job.suite.cores,
    }  # fmt: skip
    if status != "ok":
        return row
    crops = sum(spec.count for _, specs in POLICY.kinds() for spec in specs)
    return row | {
        "images_per_s": speed.median,
        "p20": speed.p20,
        "p80": speed.p80,
        "crops_per_s": crops * speed.median,
        "cpu_ms_per_image": statistics.median(m.cpu_ms_per_image for m in rounds),
        "gpu_busy_percent": statistics.median(busy) if busy else "",
        "memory_growth_mb": max(m.memory_growth_mb for m in rounds),
    }


def measure_job(job: Job) -> Measurement:
    """Runs one loader for a while. It binds its process to the first cores, so it needs a process of its own."""
    set_start_method("fork", force=True)  # Linux's default for a DataLoader's workers
    cores = sorted(os.sched_getaffinity(0))[: job.suite.cores]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    source: Source = ImageFolder(job.folder)
    if job.mode == "decoded":
        source = InMemory(source)
    step, close = build_step(job, source)
    means, spreads = [], []
    for _ in range(2 * job.suite.cores + 4):  # more than any of them reads ahead
        pixels = step()
        means.append(pixels.mean().item())
        spreads.append(pixels.std().item())
    synchronize(job.device)
    memory, cpu_before, start = [], process_cpu_seconds(), time.perf_counter()
    with GpuMonitor(job.device) as gpu:
        while time.perf_counter() - start < job.suite.seconds:
            step()
            memory.append(resident_bytes())
        synchronize(job.device)
        seconds = time.perf_counter() - start
    cpu, images, third = process_cpu_seconds() - cpu_before, len(memory) * job.suite.batch, -(-len(memory) // 3)
    growth = max(memory[-third:]) - max(memory[:third])
    close()
    return Measurement(
        images / seconds,
        1e3 * cpu / images,
        growth / 1e6,
        gpu.busy_percent,
        statistics.mean(means),
        statistics.mean(spreads),
    )


def build_step(job: Job, source: Source) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """A call that moves the next batch to the device and returns its global crops, and a call that ends the loader."""
    if job.provider == PEER:
        batches = pil_batches(source, job.suite.batch, job.suite.cores)

        def step() -> torch.Tensor:
            crops = [crop.to(job.device, non_blocking=True) for crop in next(batches)]
            return torch.stack(crops[:2])

        return step, batches.close
    kind, _, colors = job.provider.removeprefix("patchlight ").partition(", ")
    photometric, cores = "dali" if colors else "op", job.suite.cores
    loader = build_loader(
        kind, source, POLICY, job.suite.batch, photometric=photometric, workers=cores, device=job.device
    )
    return lambda: next(loader).global_crops.pixels, loader.close


class InMemory:
    """Images that are decoded once and kept."""

    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    most_pixels = MOST_PIXELS

    def __init__(self, source: Source) -> None:
        self.images = [source.read(index) for index in range(len(source))]
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index} in memory"

    def encoded(self, index: int) -> bytes:
        return as_ppm(self.images[index])

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def files(self) -> tuple[()]:
        return ()


def pil_transform(spec: CropSpec) -> Callable[[Image.Image], torch.Tensor]:
    """torchvision's transforms for one crop."""
    from torchvision import transforms as T
    from torchvision.transforms import InterpolationMode

    color = spec.photometric
    jitter = T.ColorJitter(color.brightness, color.contrast, color.saturation, color.hue)
    return T.Compose([
        T.RandomResizedCrop(spec.size, spec.scale, interpolation=InterpolationMode.BICUBIC),
        T.RandomHorizontalFlip(spec.flip),
        T.RandomApply([jitter], color.jitter),
        T.RandomGrayscale(color.gray),
        T.RandomApply([pil_blur], color.blur),
        T.RandomSolarize(128, color.solarize),
        T.ToTensor(),
        T.Normalize(POLICY.mean, POLICY.std),
    ])  # fmt: skip


def pil_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


class PilCrops(Dataset):
    """All crops of an image, cut and changed as PIL images."""

    def __init__(self, source: Source) -> None:
        self.source = source
        specs = [spec for _, specs in POLICY.kinds() for spec in specs for _ in range(spec.count)]
        self.transforms = [pil_transform(spec) for spec in specs]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = Image.fromarray(self.source.read(index))
        return [transform(image) for transform in self.transforms]


def pil_batches(source: Source, batch: int, workers: int) -> Generator[list[torch.Tensor], None, None]:
    """What most projects use: a DataLoader whose worker processes change PIL images crop by crop."""
    loader = DataLoader(
        PilCrops(source), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 with details of all sizes, about 60 kB each."""
    for number in range(count):
        rng, image = np.random.default_rng(number), np.zeros((375, 500, 3))
        for cells, strength in ((4, 1.0), (12, 0.7), (40, 0.5), (120, 0.35), (375, 0.2)):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells * 4 // 3, 3), dtype=np.uint8))
            image += strength * np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), float)
        image = 255 * (image - image.min()) / (image.max() - image.min())
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)


class GpuMonitor:
    """Share of the time in which the GPU was busy, sampled inside the `with`; None without a GPU or without pynvml."""

    busy_percent: float | None = None

    def __init__(self, device: str) -> None:
        self.samples: list[float] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample) if device == "cuda" else None

    def _sample(self) -> None:
        try:
            while not self.stop.wait(0.05):
                self.samples.append(torch.cuda.utilization())
        except ModuleNotFoundError:  # no pynvml
            self.samples.clear()

    def __enter__(self) -> GpuMonitor:
        if self.thread:
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        if self.thread:
            self.thread.join()
        self.busy_percent = statistics.mean(self.samples) if self.samples else None


def process_cpu_seconds() -> float:
    """Processor time of this process and of all its descendants, as Linux counts it."""

    def seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # with that of children that have ended
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
        return own + sum(seconds(child) for child in children)

    return seconds(os.getpid())


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def print_loader_rows(rows: list[Row]) -> None:
    """A table per mode, with ratios to the peer."""
    console = wide_console()
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        first = next((row for row in chosen if row["provider"] == PEER and row["status"] == "ok"), None)
        title = f"{mode}, {chosen[0]['cores']} cores of {chosen[0]['hardware']}, 2 x 224 + 8 x 96"
        table = Table(
            "provider",
            "images/s",
            "p20 - p80",
            "vs PIL",
            "crops/s",
            "CPU ms per image",
            "memory growth MB",
            title=title,
        )
        for row in chosen:
            if row["status"] != "ok":
                table.add_row(row["provider"], "-", row["status"])
                continue
            ratio = f"{row['images_per_s'] / first['images_per_s']:.2f}x" if first else ""
            table.add_row(
                row["provider"], f"{row['images_per_s']:.0f}", f"{row['p20']:.0f} - {row['p80']:.0f}", ratio,
                f"{row['crops_per_s']:.0f}", f"{row['cpu_ms_per_image']:.2f}", f"{row['memory_growth_mb']:.0f}",
            )  # fmt: skip
        console.print(table)
