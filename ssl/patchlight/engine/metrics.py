"""Numbers of a run: summed on the device, read at log lines only, written as JSON lines that the report draws from."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..backbones.interface import build_backbone
from ..records import Clock
from ..report.console import Display
from ..report.environment import peak_memory, write_environment
from ..report.page import write_report
from ..report.run_folder import DIAGNOSES_FILE, EPOCHS_FILE, METRICS_FILE, append_line, read_lines, rewind
from ..run import Model, Run
from .parallel import Mesh

if TYPE_CHECKING:
    from .sentinels import Diagnosis

REPORT_SECONDS = 20  # at most this often; and never more than a hundredth of the time

# Dense bf16 or fp16 operations per second, as the makers state them, by what a device's name contains; first match.
PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one image costs and what one device could do: the two sides of MFU. None: unknown, then no MFU."""

    flops_per_image: float | None = None
    peak_flops: float | None = None


class Metrics:
    """Sums device numbers per step and turns them into a log line when asked. Made and called on every rank."""

    def __init__(
        self,
        folder: str | Path,
        mesh: Mesh,
        prototypes: Mapping[str, int] | None = None,
        cost: Cost | None = None,
        display: Display | None = None,
        tensorboard: bool = False,
    ) -> None:
        """prototypes: their count by term ("ibot/patch") or objective ("dino"), for loss / ln K."""
        self.folder, self.mesh, self.cost, self.display = Path(folder), mesh, cost or Cost(), display
        self.prototypes = dict(prototypes or {})
        self.tensorboard = tensorboard
        self.writer = None
        # Per set of terms [3, T]: sums of the finite values, how many they are, how many values there were.
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.steps = 0  # since the last log line
        self.opened = False  # whether this process has logged before
        self.images = 0  # seen at the last log line
        self.began = time.perf_counter()
        self.seconds = 0.0  # of training until the last log line, earlier processes included
        self.next_report = 0.0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Takes note of one step's device numbers, without waiting for them."""
        values = torch.stack([term.detach().double() for term in terms.values()])
        finite = values.isfinite()
        row = torch.stack([torch.where(finite, values, 0.0), finite.double(), torch.ones_like(values)])
        names = tuple(terms)
        self.sums[names] = self.sums[names] + row if names in self.sums else row
        if not self.opened and self.steps == 0:
            self.began = time.perf_counter()  # the first step compiles and warms up: it does not count
        self.steps += 1

    def log(self, clock: Clock, values: Mapping[str, float]) -> dict[str, float]:
        """A log line: means over ranks and steps since the last one, which it returns with the host's values."""
        means = self._means()
        waited = torch.tensor(values.get("data/wait_seconds", 0.0), device=self.mesh.device, dtype=torch.float64)
        waited = self.mesh.max_over_all(waited).item()  # the slowest rank holds up all
        if not self.opened:
            self._open(clock)
        now = time.perf_counter()
        record = {"step": clock.step, "total": clock.total, "epoch": clock.step / clock.steps_per_epoch}
        record |= {"images": clock.images_seen, "steps": self.steps}
        record |= means | {name: float(value) for name, value in values.items()} | self._ratios(means)
        record |= self._speed(clock, now - self.began, waited)
        self.seconds += now - self.began
        record["seconds"] = round(self.seconds, 3)
        self.began, self.images, self.steps, self.opened = now, clock.images_seen, 0, True
        if self.mesh.rank == 0:
            self._write(clock, record)
        return means | {name: float(value) for name, value in values.items()}

    def diagnose(self, clock: Clock, diagnosis: Diagnosis) -> None:
        """Says by name what is wrong, and notes it."""
        if self.mesh.rank == 0:
            record = {"step": clock.step, "name": diagnosis.name, "sentence": diagnosis.sentence}
            append_line(self.folder / DIAGNOSES_FILE, record | {"fatal": diagnosis.fatal})
            if self.display:
                self.display.warn(f"step {clock.step}: {diagnosis.name}: {diagnosis.sentence}")
            if diagnosis.fatal:
                self.close()

    def close(self) -> None:
        """Ends the display and writes the report once more."""
        if self.mesh.rank == 0:
            if self.display:
                self.display.close()
            if self.writer:
                self.writer.close()
            if self.opened:
                self._report(force=True)

    def _means(self) -> dict[str, float]:
        """Means of the finite values over ranks and steps; how many were not finite; starts over."""
        means: dict[str, float] = {}
        for names, sums in self.sums.items():
            totals, finite, counts = (self.mesh.mean_over_all(sums) * self.mesh.world).tolist()
            for name, total, good, count in zip(names, totals, finite, counts, strict=True):
                means[name] = total / good if good else math.nan
                if good < count:
                    means[f"{name}/nonfinite"] = count - good
        self.sums.clear()
        return means

    def _ratios(self, means: Mapping[str, float]) -> dict[str, float]:
        """Each prototype loss over ln K: 1 means that student and teacher say the same of everything."""
        terms = [name for name in means if name.count("/") == 1]
        counts = {name: self.prototypes.get(name) or self.prototypes.get(name.split("/")[0]) for name in terms}
        return {f"{name}/ln_k": means[name] / math.log(count) for name, count in counts.items() if count}

    def _speed(self, clock: Clock, seconds: float, waited: float) -> dict[str, float]:
        """Images and waiting per second, use of the device, memory."""
        if self.opened:
            images, steps = clock.images_seen - self.images, self.steps
        else:  # the time runs from the end of the first step
            images, steps = clock.images_seen / clock.step * (self.steps - 1), self.steps - 1
        speed = {"data/wait_seconds": waited, "memory/gib": round(peak_memory(self.mesh.device) / 2**30, 4)}
        if steps < 1 or seconds <= 0:
            return speed
        rate = images / seconds
        speed |= {"speed/images_per_second": rate, "speed/seconds_per_step": seconds / steps}
        speed["data/wait_share"] = min(1.0, waited / self.steps * steps / seconds)
        if self.cost.flops_per_image and self.cost.peak_flops:
            speed["speed/mfu"] = rate * self.cost.flops_per_image / (self.cost.peak_flops * self.mesh.world)
        return speed

    def _open(self, clock: Clock) -> None:
        """Before the first line of this process: removes lines of a future that a resumed run has lost."""
        start = clock.step - self.steps
        self.images = clock.images_seen
        if self.mesh.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = rewind(self.folder / METRICS_FILE, lambda line: line["step"] <= start)
        rewind(self.folder / DIAGNOSES_FILE, lambda line: line["step"] <= start)
        rewind(self.folder / EPOCHS_FILE, lambda line: (line["epoch"] + 1) * clock.steps_per_epoch <= start)
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        write_environment(self.folder)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))

    def _write(self, clock: Clock, record: dict[str, float]) -> None:
        append_line(self.folder / METRICS_FILE, record)
        self._write_epochs(clock)
        if self.writer:
            for name, value in record.items():
                self.writer.add_scalar(name, value, clock.step)
        if self.display:
            self.display.update(record)
        self._report(force=False)

    def _write_epochs(self, clock: Clock) -> None:
        """A line in log.txt for each epoch that is over. A log line counts to the epoch that its last step belongs to."""
        path = self.folder / EPOCHS_FILE
        done = len(read_lines(path))
        if done >= clock.step // clock.steps_per_epoch:
            return
        lines = read_lines(self.folder / METRICS_FILE)
        for epoch in range(done, clock.step // clock.steps_per_epoch):
            first, last = epoch * clock.steps_per_epoch, (epoch + 1) * clock.steps_per_epoch
            inside = [line for line in lines if first < line["step"] <= last]
            inside = inside or [next(line for line in lines if line["step"] > first)]
            append_line(path, epoch_line(epoch, inside))

    def _report(self, force: bool) -> None:
        now = time.perf_counter()
        if force or now >= self.next_report:
            write_report(self.folder)
            took = time.perf_counter() - now
            self.next_report = now + max(REPORT_SECONDS, 100 * took)


def build_metrics(run: Run, mesh: Mesh) -> Metrics:
    """The metrics of a run: files in its folder, a progress bar, and TensorBoard where that is installed."""
    display = Display() if mesh.rank == 0 else None
    peak = peak_flops(mesh.device, run.parallel.precision)
    cost = Cost(None if peak is None else flops_per_image(run), peak)
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    return Metrics(run.output.folder, mesh, prototype_counts(run), cost, display, tensorboard)


def prototype_counts(run: Run) -> dict[str, int]:
    """How many prototypes each objective has, by its name, or by a term's where that differs."""
    counts = {}
    for options in run.objectives.options:
        name = type(options).__name__.removesuffix("Options").lower()
        if prototypes := getattr(options, "prototypes", None):
            counts[name] = prototypes
        if patches := getattr(options, "patch_prototypes", None):
            counts[f"{name}/patch"] = patches
    return counts


def flops_per_image(run: Run) -> float:
    """Useful operations of one training step per image: the student forward and backward, the teacher forward on global
    crops. Backbones only, so MFU is a lower bound."""
    forward = {
        kind: sum(spec.count for spec in specs) * backbone_flops(run.model, specs[0].size)
        for kind, specs in run.data.crops.kinds()
    }
    return 3 * sum(forward.values()) + forward["global_crops"]


def backbone_flops(model: Model, image_size: int) -> float:
    """Operations (2 per multiply-add) of a backbone's forward pass on one image, counted without computing it."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone = build_backbone(
            model.arch, patch_size=model.patch_size, image_size=model.image_size, **model.sizes
        ).eval()
        backbone(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that the device's maker states for a number format; None where unknown."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def epoch_line(epoch: int, lines: list[dict]) -> dict[str, float]:
    """DINO's line of an epoch: means over its log lines under train_ names; rates as of its end."""
    steps = sum(line["steps"] for line in lines)
    names = {"loss": "train_loss", "lr": "train_lr", "weight_decay": "train_wd"}
    names |= {name: f"train_{name}" for name in lines[-1] if name.count("/") == 1 and name.split("/")[0] not in _HOST}
    record: dict[str, float] = {}
    for name, written in names.items():
        values = [(line["steps"], line[name]) for line in lines if name in line]
        if values:
            record[written] = sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)
    return record | {"epoch": epoch, "steps": steps}


_HOST = {"data", "memory", "speed", "step", "gradient", "teacher"}
