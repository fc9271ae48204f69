"""What the student is taught: the teacher's distributions, kept from collapse by centering or by Sinkhorn.

Both ways are a bias per prototype in the teacher's softmax. A target rule is called with the teacher rows whose
statistics count and returns that bias; `after_step` moves its state, once per optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..records import Clock

CHUNK_LOGITS = 1 << 26  # logits that Sinkhorn holds at once, 256 MiB in fp32


@dataclass(frozen=True, slots=True)
class TeacherTemperature:
    """Linear from `warmup` to `final`, then constant: a pure function of the clock.

    by="epoch" is the released reading: one value per epoch, the first of `epochs` warm-up epochs at `warmup`, the last
    already at `final`. by="step" draws the same line with one value per step. The line begins at epoch `start`.
    """

    warmup: float
    final: float
    epochs: int
    by: str = "epoch"
    start: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("epoch", "step"):
            raise ValueError(f"TeacherTemperature: by is 'epoch' or 'step', got {self.by!r}; 'epoch' is as released.")
        if min(self.warmup, self.final) <= 0:
            raise ValueError(
                f"TeacherTemperature: temperatures must be positive, got {self.warmup} and {self.final}; 0.04 is usual."
            )

    def at(self, clock: Clock) -> float:
        now, length = clock.epoch - self.start, self.epochs
        if self.by == "step":
            now, length = clock.step - self.start * clock.steps_per_epoch, self.epochs * clock.steps_per_epoch
        if now >= length:
            return self.final
        now = max(now, 0)
        return self.warmup + (self.final - self.warmup) * now / max(length - 1, 1)


class Center(nn.Module):
    """Centering (DINO): the bias is minus a running mean of the teacher's logits.

    The mean is linear, mean(z W^T) = W mean(z), so a step gathers the sum of its rows (D numbers) and how many there
    were, over all micro-batches; ranks add up these D + 1 numbers, and no row of logits is computed for it. A step uses
    the center of the steps before it. A mean that is not finite leaves the center as it was: the loss of such a step is
    not finite either, and one bad batch must not outlive it here.
    """

    def __init__(self, prototypes: int, bottleneck: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("row_sum", torch.zeros(bottleneck), persistent=False)  # zero between steps
        self.register_buffer("row_count", torch.zeros(1), persistent=False)
        self.directions: Tensor | None = None  # [K, D] of this step; by after_step the teacher has already moved

    def bias(self) -> Tensor:
        """[K] in logit units."""
        return -self.center

    @torch.no_grad()
    def forward(
        self, z_RD: Tensor, directions_KD: Tensor, temperature: float | Tensor, counts_R: Tensor | None = None
    ) -> Tensor:
        """Takes note of the rows (all, or those that counts_R marks) and returns the bias as it was before them."""
        if counts_R is None:
            self.row_sum += z_RD.sum(dim=0, dtype=self.row_sum.dtype)
            self.row_count += len(z_RD)
        else:
            self.row_sum += (z_RD * counts_R.unsqueeze(1)).sum(dim=0, dtype=self.row_sum.dtype)
            self.row_count += counts_R.sum()
        self.directions = directions_KD
        return self.bias()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.directions is None:
            raise RuntimeError(
                "Center: a step needs a forward before after_step, got none; call after_step once per optimizer step."
            )
        seen = torch.cat([self.row_sum, self.row_count])
        if distributed():
            dist.all_reduce(seen)
        with torch.autocast(seen.device.type, enabled=False):
            mean = self.directions.to(seen.dtype) @ (seen[:-1] / seen[-1])
        moved = self.momentum * self.center + (1 - self.momentum) * mean
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))
        self.row_sum.zero_()
        self.row_count.zero_()
        self.directions = None


class Sinkhorn(nn.Module):
    """Sinkhorn-Knopp (SwAV): targets that use all prototypes equally over the rows of all ranks. It has no state.

    The plain algorithm scales Q = exp(z W^T / temperature) by turns so that every prototype has an equal share and
    every row sums to 1. Its result is u_k Q_rk v_r with v_r whatever makes row r sum to 1, which is what a softmax
    does; so softmax((z W^T + temperature * log u) / temperature) is exactly that result, and log u is all it takes.
    In the log domain and fp32, in chunks of rows; ranks exchange two vectors of K numbers per iteration. Micro-batches
    are balanced each by itself: accumulating over four of them is not the same as one batch four times as large.
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
        log_u = None
        with torch.autocast(z.device.type, enabled=False):
            for _ in range(self.iterations):
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
        if log_u is not None:  # the first turn starts from unscaled rows
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


def build_target(kind: str, prototypes: int, bottleneck: int, momentum: float) -> Center | Sinkhorn:
    """The target rule by its name."""
    if kind == "centering":
        return Center(prototypes, bottleneck, momentum)
    if kind == "sinkhorn":
        return Sinkhorn()
    raise ValueError(f"target is 'centering' or 'sinkhorn', got {kind!r}; 'centering' is as released.")


def distributed() -> bool:
    """Whether there are other ranks to ask."""
    return dist.is_available() and dist.is_initialized()
