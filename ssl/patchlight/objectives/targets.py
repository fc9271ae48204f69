"""The student's targets: the teacher's distributions, kept from collapse by centering or by Sinkhorn.

Both are a bias per prototype in the teacher's softmax. A target rule is called with the teacher rows that its statistics
are over, and returns that bias; `after_step` updates its state, once per optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check, check_choice, check_numbers, check_positive
from ..records import Clock

TARGETS = ("centering", "sinkhorn")
WARMUPS = ("epoch", "step")
CHUNK_LOGITS = 1 << 26  # logits that Sinkhorn holds at once, 256 MiB in fp32


def check_target_options(options: Any) -> None:
    """Checks the options that methods with prototypes share, by their names."""
    name = type(options).__name__
    for field in ("prototypes", "patch_prototypes"):
        reason = "with one prototype the loss is 0, whatever the student does; use 4096 or more"
        check(getattr(options, field, 2) != 1, f"{name}.{field} must be 2 or more", 1, reason)
    sizes = ("bottleneck", "hidden", "layers")
    check_numbers(options, prototypes="[2, inf)", patch_prototypes="[2, inf)", **dict.fromkeys(sizes, "[1, inf)"))
    branches = ("student", "teacher", "warmup_teacher", "patch_teacher", "warmup_patch_teacher")
    check_numbers(options, **{f"{branch}_temperature": "(0, inf)" for branch in branches})
    check_numbers(options, warmup_epochs="[0, inf)", patch_start_epoch="[0, inf)")
    check_numbers(options, center_momentum="[0, 1]", patch_center_momentum="[0, 1]")
    check_choice(f"{name}.target", options.target, TARGETS)
    check_choice(f"{name}.warmup_by", options.warmup_by, WARMUPS)


@dataclass(frozen=True, slots=True)
class TeacherTemperature:
    """Linear from `warmup` to `final`, then constant: a pure function of the clock.

    by="epoch", as released: one value per epoch, the first of `epochs` warm-up epochs at `warmup`, the last
    already at `final`. by="step": the same line with one value per step. The line begins at epoch `start`.
    """

    warmup: float
    final: float
    epochs: int
    by: str = "epoch"
    start: int = 0

    def __post_init__(self) -> None:
        check_choice("TeacherTemperature: by", self.by, WARMUPS)
        for temperature in (self.warmup, self.final):
            check_positive("TeacherTemperature: a temperature", temperature, "0.04 is usual")

    def at(self, clock: Clock) -> float:
        now, length = clock.epoch - self.start, self.epochs
        if self.by == "step":
            now, length = clock.step - self.start * clock.steps_per_epoch, self.epochs * clock.steps_per_epoch
        if now >= length:
            return self.final
        now = max(now, 0)
        return self.warmup + (self.final - self.warmup) * now / max(length - 1, 1)


def temperature_of(options: Any) -> TeacherTemperature:
    """The teacher's temperature by the options' four fields for it."""
    warmup, final = options.warmup_teacher_temperature, options.teacher_temperature
    return TeacherTemperature(warmup, final, options.warmup_epochs, options.warmup_by)


class Center(nn.Module):
    """Centering (DINO): the bias is minus a running mean of the teacher's logits.

    The mean is linear, mean(z W^T) = W mean(z), so no row of logits is computed for it: a forward adds W times the sum of
    its rows, and their number, over all batches of a step; ranks then add up these K + 1 numbers. A step uses the center of
    the steps before it. A mean that is not finite does not change the center, as one bad batch must not stay in it, and
    neither does a step without rows.
    """

    center: Tensor
    logit_sum: Tensor
    row_count: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("logit_sum", torch.zeros(prototypes), persistent=False)  # zero between steps
        self.register_buffer("row_count", torch.zeros(1), persistent=False)

    def bias(self) -> Tensor:
        """[K] in logit units."""
        return -self.center

    @torch.no_grad()
    def forward(
        self, z_RD: Tensor, directions_KD: Tensor, temperature: float | Tensor, counts_R: Tensor | None = None
    ) -> Tensor:
        """Adds the rows (all, or those that counts_R marks) to this step's mean; returns the bias of the steps before."""
        dtype = self.logit_sum.dtype
        with torch.autocast(z_RD.device.type, enabled=False):
            if counts_R is None:
                row_sum = z_RD.sum(dim=0, dtype=dtype)
                self.row_count += len(z_RD)
            else:
                row_sum = (z_RD * counts_R.unsqueeze(1)).sum(dim=0, dtype=dtype)
                self.row_count += counts_R.sum()
            self.logit_sum += directions_KD.to(dtype) @ row_sum
        return self.bias()

    @torch.no_grad()
    def after_step(self) -> None:
        total = torch.cat([self.logit_sum, self.row_count])
        if distributed():
            dist.all_reduce(total)
        moved = self.momentum * self.center + (1 - self.momentum) * (total[:-1] / total[-1])
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))
        self.logit_sum.zero_()
        self.row_count.zero_()


class Sinkhorn(nn.Module):
    """Sinkhorn-Knopp (SwAV): targets that use all prototypes equally over the rows of all ranks. It has no state.

    The plain algorithm scales Q = exp(z W^T / temperature) in turn so that every prototype has an equal share and
    every row sums to 1. Its result is u_k Q_rk v_r, where v_r makes row r sum to 1. A softmax makes this sum too; so
    softmax((z W^T + temperature * log u) / temperature) is exactly that result, and only log u is computed: in the log
    domain and fp32, in chunks of rows; ranks exchange two vectors of K numbers per iteration. Each accumulated batch is
    balanced alone: four of them do not give the result of one batch four times as large.
    """

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def forward(
        self, z_RD: Tensor, directions_KD: Tensor, temperature: float | Tensor, counts_R: Tensor | None = None
    ) -> Tensor:
        """The bias [K] in logit units that balances the rows (all, or those that counts_R marks)."""
        z = z_RD.to(torch.promote_types(z_RD.dtype, torch.float32))
        w = directions_KD.to(z.dtype) / temperature
        log_count = z.new_zeros(len(z)) if counts_R is None else counts_R.to(z.dtype).log()
        with torch.autocast(z.device.type, enabled=False):
            log_u = -_shares(z, w, log_count, None)
            for _ in range(self.iterations - 1):
                log_u = -_shares(z, w, log_count, log_u)
        return temperature * torch.where(log_u.isfinite(), log_u, 0.0)  # not finite: no rank has a row that counts

    def after_step(self) -> None:
        pass


def _shares(z: Tensor, w: Tensor, log_count: Tensor, log_u: Tensor | None) -> Tensor:
    """[K] the log of each prototype's mass over the rows of all ranks, after every row is scaled to sum to 1."""
    size = max(1, CHUNK_LOGITS // len(w))
    parts = []
    for z_part, row_scale in zip(z.split(size), log_count.split(size), strict=True):
        logits = z_part @ w.T
        if log_u is not None:  # the first iteration starts from unscaled rows
            row_scale = row_scale - (logits + log_u).logsumexp(dim=1)
        parts.append((logits + row_scale.unsqueeze(1)).logsumexp(dim=0))
    log_mass = torch.stack(parts).logsumexp(dim=0)
    if not distributed():
        return log_mass
    highest = log_mass.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    highest.clamp_(min=torch.finfo(highest.dtype).min)  # a prototype without any mass: no infinity minus infinity
    mass = (log_mass - highest).exp()
    dist.all_reduce(mass)
    return highest + mass.log()


def build_target(kind: str, prototypes: int, momentum: float) -> Center | Sinkhorn:
    """The target rule by its name."""
    check_choice("target", kind, TARGETS)
    return Center(prototypes, momentum) if kind == "centering" else Sinkhorn()


def distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()
