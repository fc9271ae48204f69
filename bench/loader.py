"""Loaders alone, on generated JPEGs: ours beside torchvision's DataLoader with the same augmentation on the same cores."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from patchlight.data.loaders import build_loader, dali_is_there
from patchlight.data.policy import selfpatch_policy
from patchlight.data.sources import ImageFolder
from patchlight.data.stored import Source, as_ppm

from .machine import PROVENANCE, provenance
from .ops import write
from .timing import summarize

POLICY = selfpatch_policy()  # 2 x 224 and 8 x 96
PEER = "torchvision DataLoader, PIL"
PROVIDERS = (PEER, "patchlight torchvision", "patchlight dali", "patchlight dali, DALI's colors")
MODES = ("files", "decoded")  # JPEG files; pictures that lie decoded in memory
GATE = 0.1  # how far the mean and the spread of a provider's normalized pixels may lie from those of the others
COLUMNS = (
    "provider", "mode", "device", "status", "cores", "batch", "images_per_s", "p20", "p80", "crops_per_s",
    "cpu_ms_per_image", "gpu_busy_percent", "memory_growth_mb", "rounds", "seconds", "images", "dali", *PROVENANCE,
)  # fmt: skip


@dataclass(frozen=True)
class LoaderSuite:
    """What to run."""

    images: int = 256
    batch: int = 32
    cores: int = 2
    seconds: float = 6.0  # per provider, mode and round, after the warm-up
    rounds: int = 3
    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = PROVIDERS


@dataclass(frozen=True)
class Job:
    """One provider in one process of its own, so that nobody's workers read ahead in another's turn."""

    provider: str
    mode: str
    folder: str
    device: str
    suite: LoaderSuite


@dataclass(frozen=True)
class Measured:
    """What a job found."""

    images_per_s: float
    cpu_ms_per_image: float
    memory_growth_mb: float  # how far this process's memory in the last third went beyond that in the first
    gpu_busy_percent: float | None
    mean: float  # of the normalized pixels
    spread: float


def measure_loader(
    suite: Annotated[LoaderSuite, tyro.conf.arg(name="")] = LoaderSuite(),
    out: Path = Path("bench/out/loader.csv"),
) -> None:
    """Time the input pipeline alone, with decoding and without.

    Args:
        suite: what to run.
        out: the CSV to write.
    """
    rows = run(suite)
    write(rows, out, COLUMNS)
    show(rows)
    print(f"rows: {out}")


def run(suite: LoaderSuite) -> list[dict]:
    """All providers in turn, round after round, each on the same cores; a row per provider and mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [p for p in suite.providers if "dali" not in p or dali_is_there()]
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        write_photos(Path(folder), suite.images)
        jobs = [Job(p, mode, folder, device, suite) for mode in suite.modes for p in chosen]
        task, found = progress.add_task("", total=suite.rounds * len(jobs)), {job: [] for job in jobs}
        for _ in range(suite.rounds):
            for job in jobs:
                progress.update(task, description=f"{job.provider}, {job.mode}")
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found[job].append(pool.submit(measure, job).result())
                progress.advance(task)
    return [row(job, rounds, judged(rounds, found)) for job, rounds in found.items()]


def judged(rounds: list[Measured], found: dict[Job, list[Measured]]) -> str:
    """Whether what a provider delivers looks like what all deliver."""
    for name in ("mean", "spread"):
        everyone = statistics.median(getattr(m, name) for measured in found.values() for m in measured)
        own = statistics.mean(getattr(m, name) for m in rounds)
        if abs(own - everyone) > GATE:
            return f"{name} of its pixels is {own:.2f}, the others' {everyone:.2f}"
    return "ok"


def row(job: Job, rounds: list[Measured], status: str) -> dict:
    from importlib.metadata import PackageNotFoundError, version

    speed = summarize([m.images_per_s for m in rounds])
    busy = [m.gpu_busy_percent for m in rounds if m.gpu_busy_percent is not None]
    try:
        dali = version("nvidia-dali-cuda130")
    except PackageNotFoundError:
        dali = ""
    facts = {
        "provider": job.provider, "mode": job.mode, "device": job.device, "status": status, "cores": job.suite.cores,
        "batch": job.suite.batch, "rounds": speed.rounds, "seconds": job.suite.seconds, "images": job.suite.images,
        **provenance(job.device).columns(), "dali": dali, "threads": job.suite.cores,
    }  # fmt: skip
    if status != "ok":
        return facts
    crops = sum(spec.count for _, specs in POLICY.kinds() for spec in specs)
    return facts | {
        "images_per_s": speed.median,
        "p20": speed.p20,
        "p80": speed.p80,
        "crops_per_s": crops * speed.median,
        "cpu_ms_per_image": statistics.median(m.cpu_ms_per_image for m in rounds),
        "gpu_busy_percent": statistics.median(busy) if busy else "",
        "memory_growth_mb": max(m.memory_growth_mb for m in rounds),
    }


def measure(job: Job) -> Measured:
    """Runs one loader for a while. In a process of its own: it keeps to the cores it is given."""
    set_start_method("fork", force=True)  # Linux's own choice for a DataLoader's workers
    cores = sorted(os.sched_getaffinity(0))[: job.suite.cores]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    source = ImageFolder(job.folder) if job.mode == "files" else InMemory(ImageFolder(job.folder))
    step, close = build(job, source)
    looks = []
    for _ in range(2 * job.suite.cores + 4):  # more than any of them reads ahead
        pixels = step()
        looks.append((pixels.mean().item(), pixels.std().item()))
    synchronize(job.device)
    memory, cpu, began = [], tree_cpu_seconds(), time.perf_counter()
    with GpuWatch(job.device) as watch:
        while time.perf_counter() - began < job.suite.seconds:
            step()
            memory.append(own_memory())
        synchronize(job.device)
        seconds = time.perf_counter() - began
    cpu, images, third = tree_cpu_seconds() - cpu, len(memory) * job.suite.batch, -(-len(memory) // 3)
    growth = max(memory[-third:]) - max(memory[:third])
    close()
    return Measured(
        images / seconds,
        1e3 * cpu / images,
        growth / 1e6,
        watch.busy_percent,
        *map(statistics.mean, zip(*looks, strict=True)),
    )


def build(job: Job, source: Source) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
    """A call that takes the next batch to the device and returns its global crops, and one that ends the loader."""
    if job.provider == PEER:
        batches = pil_batches(source, job.suite.batch, job.suite.cores)

        def step() -> torch.Tensor:
            crops = [crop.to(job.device, non_blocking=True) for crop in next(batches)]
            return torch.stack(crops[:2])

        return step, batches.close
    kind, _, colors = job.provider.removeprefix("patchlight ").partition(", ")
    options = {"workers": job.suite.cores, "device": job.device}
    loader = build_loader(kind, source, POLICY, job.suite.batch, photometric="dali" if colors else "op", **options)
    return lambda: next(loader).global_crops.pixels, loader.close


class InMemory:
    """Images decoded once and kept."""

    classes, labels = (), None

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


def pil_batches(source: Source, batch: int, workers: int) -> Iterator[list[torch.Tensor]]:
    """What most projects do: a DataLoader of worker processes, each changing PIL images crop by crop."""
    from PIL import ImageFilter
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms as T
    from torchvision.transforms import InterpolationMode

    class Blur:
        def __call__(self, image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))

    def chain(spec) -> T.Compose:
        look = spec.photometric
        jitter = T.ColorJitter(look.brightness, look.contrast, look.saturation, look.hue)
        return T.Compose([
            T.RandomResizedCrop(spec.size, spec.scale, interpolation=InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(spec.flip),
            T.RandomApply([jitter], look.jitter),
            T.RandomGrayscale(look.gray),
            T.RandomApply([Blur()], look.blur),
            T.RandomSolarize(128, look.solarize),
            T.ToTensor(),
            T.Normalize(POLICY.mean, POLICY.std),
        ])  # fmt: skip

    chains = [chain(spec) for _, specs in POLICY.kinds() for spec in specs for _ in range(spec.count)]

    class Crops(Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            image = Image.fromarray(source.read(index))
            return [chain(image) for chain in chains]

    loader = DataLoader(Crops(), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)
    while True:
        yield from loader


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 with detail of all sizes, about 60 kB each."""
    for number in range(count):
        rng, image = np.random.default_rng(number), np.zeros((375, 500, 3))
        for cells, strength in ((4, 1.0), (12, 0.7), (40, 0.5), (120, 0.35), (375, 0.2)):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells * 4 // 3, 3), dtype=np.uint8))
            image += strength * np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), float)
        image = 255 * (image - image.min()) / (image.max() - image.min())
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)


class GpuWatch:
    """Share of the time in which the GPU did anything, sampled while it is entered; None without a GPU or its monitor."""

    busy_percent: float | None = None

    def __init__(self, device: str) -> None:
        self.samples: list[float] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample) if device == "cuda" else None

    def _sample(self) -> None:
        try:
            while not self.stop.wait(0.05):
                self.samples.append(torch.cuda.utilization())
        except ModuleNotFoundError:  # pynvml
            self.samples.clear()

    def __enter__(self) -> GpuWatch:
        if self.thread:
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        if self.thread:
            self.thread.join()
        self.busy_percent = statistics.mean(self.samples) if self.samples else None


def tree_cpu_seconds() -> float:
    """Processor time of this process and of all below it, as Linux counts it."""

    def seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # with what ended children used
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
        return own + sum(seconds(child) for child in children)

    return seconds(os.getpid())


def own_memory() -> int:
    """Bytes that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def show(rows: list[dict]) -> None:
    """A table per mode, ratios to the peer."""
    console = Console(width=max(120, Console().width))
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        first = next((row for row in chosen if row["provider"] == PEER and row["status"] == "ok"), None)
        title = f"{mode}, {chosen[0]['cores']} cores of {chosen[0]['hardware']}, 2 x 224 + 8 x 96"
        table = Table(
            "provider", "images/s", "p20 - p80", "vs PIL", "crops/s", "CPU ms per image", "MB grown", title=title
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
