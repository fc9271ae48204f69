"""Schedules as pure functions of the step, exactly as the methods' released code has them."""

from __future__ import annotations

import math

from ..records import Clock
from ..run import Optim


def cosine(
    step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0.0, ends: str = "last"
) -> float:
    """A line from `start` to `base` over `warmup` steps, then half a cosine towards `final`.

    Step 0 has `start`, the first cosine step has `base`, and `final` is reached only one step after the last. With
    ends="last" the last warm-up step has `base` already, as DINO, iBOT and SelfPatch release it; with "next" the first
    cosine step has it first, as in MoCo v3. Learning rate, weight decay and teacher momentum all follow it.
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - (ends == "last"))
    done = (step - warmup) / max(1, total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_steps(clock: Clock, optim: Optim) -> int:
    """Steps over which the learning rate rises."""
    return int(optim.warmup_epochs * clock.steps_per_epoch)


def rates_at(clock: Clock, optim: Optim, global_batch: int) -> dict[str, float]:
    """The rates of the step that comes next; momentum is the teacher's, freeze_prototypes 0 or 1."""
    step, total = clock.step, clock.total
    warmup = warmup_steps(clock, optim)
    peak, start, ends = optim.peak_lr(global_batch), optim.warmup_start_lr, optim.warmup_ends
    return {
        "lr": cosine(step, total, peak, optim.min_lr, warmup, start, ends),
        "weight_decay": cosine(step, total, optim.weight_decay, optim.weight_decay_end),
        "momentum": cosine(step, total, optim.teacher_momentum, optim.teacher_momentum_end),
        "freeze_prototypes": float(clock.epoch < optim.freeze_prototypes_epochs),
    }
