"""Numbers of a run: summed on the device, read at log lines only."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ..cost import Cost
from ..records import Clock
from ..report.environment import peak_memory
from ..report.journal import Journal
from .parallel import Mesh
from .sentinels import Diagnosis


class Metrics:
    """Sums device numbers per step and turns them into log lines. Built and called on every rank."""

    def __init__(
        self,
        mesh: Mesh,
        journal: Journal | None = None,
        prototypes: Mapping[str, int] | None = None,
        cost: Cost | None = None,
    ) -> None:
        """journal: writes the lines, on rank 0. prototypes: how many each term has, for loss / ln K."""
        self.mesh, self.journal, self.cost = mesh, journal, cost or Cost()
        self.prototypes = dict(prototypes or {})
        # Per set of terms [3, T]: sums of the finite values, their number, the number of all values.
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.steps = 0  # since the last log line
        self.opened = False  # whether this process has logged before
        self.images = 0  # images_seen at the last log line
        self.began = time.perf_counter()
        self.seconds = 0.0  # of training until the last log line, earlier processes included

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds one step's device numbers, without waiting for them."""
        values = torch.stack([term.detach().double() for term in terms.values()])
        finite = values.isfinite()
        row = torch.stack([torch.where(finite, values, 0.0), finite.double(), torch.ones_like(values)])
        names = tuple(terms)
        self.sums[names] = self.sums[names] + row if names in self.sums else row
        if not self.opened and self.steps == 0:
            self.began = time.perf_counter()  # the first step compiles and warms up: it does not count
        self.steps += 1

    def log(self, clock: Clock, values: Mapping[str, float]) -> dict[str, float]:
        """Writes a log line: means over ranks and steps since the last one. Returns them with the host's values."""
        means = self._means()
        waited = torch.tensor(values.get("data/wait_seconds", 0.0), device=self.mesh.device, dtype=torch.float64)
        slowest = self.mesh.max_over_all(waited).item()  # all ranks wait for the slowest
        start = clock.step - self.steps
        if not self.opened:
            self.images = clock.images_seen
            self.seconds = self.journal.open(clock, start) if self.journal else 0.0
        now = time.perf_counter()
        record: dict[str, float] = {
            "step": clock.step,
            "total": clock.total,
            "epoch": clock.step / clock.steps_per_epoch,
        }
        record |= {"images": clock.images_seen, "steps": self.steps}
        record |= means | {name: float(value) for name, value in values.items()} | self._ratios(means)
        record |= self._speed(clock, now - self.began, slowest)
        self.seconds += now - self.began
        record["seconds"] = round(self.seconds, 3)
        self.began, self.images, self.steps, self.opened = now, clock.images_seen, 0, True
        if self.journal:
            self.journal.write(clock, record)
        return means | {name: float(value) for name, value in values.items()}

    def look(self, clock: Clock, accuracies: Mapping[str, float], pictures: Mapping[str, bytes]) -> None:
        """Hands a look at the teacher to the journal's trackers."""
        if self.journal:
            self.journal.look(clock, clock.step - self.steps, accuracies, pictures)

    def diagnose(self, clock: Clock, diagnosis: Diagnosis) -> None:
        """Writes a diagnosis to the journal. A fatal one is the last entry."""
        if self.journal:
            self.journal.warn(clock, diagnosis.name, diagnosis.sentence, diagnosis.fatal)
        if diagnosis.fatal:
            self.close()

    def close(self) -> None:
        """Closes the journal at the end of the run."""
        if self.journal:
            self.journal.close()

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
        """Each prototype loss over ln K: 1 means that all images have the same output."""
        return {
            f"{term}/ln_k": means[term] / math.log(count) for term, count in self.prototypes.items() if term in means
        }

    def _speed(self, clock: Clock, seconds: float, waited: float) -> dict[str, float]:
        """Images per second, share of time waiting for data, MFU, memory."""
        if self.opened:
            images: float = clock.images_seen - self.images
            steps = self.steps
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
