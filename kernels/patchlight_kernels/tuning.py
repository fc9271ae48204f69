"""Autotuning that also works in Triton's interpreter, which cannot measure time, and where results must repeat."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from . import hardware


class Tuned:
    """A kernel with configurations to choose from; it is launched like any other.

    Sums differ in their last bits between configurations, and the fastest one differs from run to run. So the first one runs
    where algorithms must be deterministic (`torch.use_deterministic_algorithms`).
    """

    def __init__(self, kernel: Callable, configs: list[triton.Config], key: list[str]) -> None:
        self.fixed = triton.autotune(configs=configs[:1], key=key)(kernel)
        self.fastest = (
            self.fixed if hardware.triton_interpreted() else triton.autotune(configs=configs, key=key)(kernel)
        )

    def __getitem__(self, grid: object) -> Callable:
        return (self.fixed if torch.are_deterministic_algorithms_enabled() else self.fastest)[grid]


def autotune(configs: list[triton.Config], key: list[str]) -> Callable[[Callable], Tuned]:
    """`triton.autotune` over `configs`. Triton's interpreter, and deterministic runs, take the first one."""
    return lambda kernel: Tuned(kernel, configs, key)
