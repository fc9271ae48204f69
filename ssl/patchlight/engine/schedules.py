"""Schedules as pure functions of the step, exactly as the methods' released code has them."""

from __future__ import annotations

import math


def cosine(
    step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0.0, ends: str = "last"
) -> float:
    """A line from `start` to `base` over `warmup` steps, then half a cosine towards `final`.

    Step 0 has `start`, the first cosine step has `base`, and `final` is reached only one step after the last. With
    ends="last" the last warm-up step has `base` already, as DINO, iBOT and SelfPatch release it; with "next" the line
    meets the cosine one step later, as in MoCo v3. Learning rate, weight decay and teacher momentum all follow it.
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - (ends == "last"))
    done = (step - warmup) / max(1, total - warmup)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * min(1.0, done)))
