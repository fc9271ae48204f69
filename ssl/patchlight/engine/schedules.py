"""Schedules as pure functions of the step, exactly as DINO, iBOT and SelfPatch release them."""

from __future__ import annotations

import math


def cosine(step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0.0) -> float:
    """A line from `start` to `base` over `warmup` steps, both ends included, then half a cosine towards `final`.

    So step 0 has `start`, the last warm-up step and the first cosine step both have `base`, and `final` is reached
    only one step after the last. Learning rate, weight decay and teacher momentum all follow it.
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    done = (step - warmup) / max(1, total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, done)))
