"""The state of all random number generators of a process, as tensors of a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .manifest import StoredTensor


def blank_random_state(stored: Mapping[str, StoredTensor], rank: int) -> dict[str, Tensor]:
    """Empty tensors to load this rank's random state into."""
    prefix = f"random.rank{rank}."
    found = {name.removeprefix(prefix): entry for name, entry in stored.items() if name.startswith(prefix)}
    return {name: torch.empty(entry.shape, dtype=torch.uint8) for name, entry in found.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """All random number generators of this process, as tensors."""
    name, keys, *rest = cast("tuple", np.random.get_state())  # noqa: NPY002 libraries use the global generator
    host = json.dumps([random.getstate(), [name, keys.tolist(), *rest]]).encode()
    state = {"torch": torch.get_rng_state(), "host": torch.frombuffer(bytearray(host), dtype=torch.uint8)}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    (version, words, gauss), numpy_state = json.loads(bytes(state["host"].tolist()))
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(numpy_state))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
