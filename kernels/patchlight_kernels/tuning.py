"""Autotuning that also works in Triton's interpreter, which cannot measure time."""

from __future__ import annotations

from collections.abc import Callable

import triton

from . import hardware


def autotune(configs: list[triton.Config], key: list[str]) -> Callable:
    """`triton.autotune` over `configs`; the interpreter takes the first one, which is therefore the default."""
    return triton.autotune(configs=configs[:1] if hardware.triton_interpreted() else configs, key=key)
