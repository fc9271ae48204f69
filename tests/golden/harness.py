"""Reads recorded numbers of the released code. Each file is one case; a check registers for a name prefix.

    @check("dino_loss")
    def dino_loss(case): case.close("output.loss", my_loss(case["input.student"]), rel=1e-5)

`$PATCHLIGHT_GOLDEN` points to another folder. The longest matching prefix wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

FOLDER = Path(os.environ.get("PATCHLIGHT_GOLDEN", Path(__file__).parent))
CHECKS: dict[str, Callable[[Case], None]] = {}


class Case:
    """One recorded case: tensors by key, the configuration that made them, and comparisons that name what differs."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        with safe_open(path, "pt") as file:
            self.meta = file.metadata() or {}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config = json.loads(self.meta.get("config", "{}"))

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose key starts with `prefix`, without it."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def close(self, key: str, actual: torch.Tensor, rel: float, floor: float = 0.0) -> None:
        """max|actual - recorded| <= rel * max|recorded| + floor, with both shapes equal."""
        recorded = self.tensors[key].double()
        actual = actual.detach().double()
        assert actual.shape == recorded.shape, (
            f"{self.name} {key}: shape {tuple(actual.shape)}, recorded {tuple(recorded.shape)}"
        )
        error = (actual - recorded).abs().max().item() if recorded.numel() else 0.0
        scale = recorded.abs().max().item() if recorded.numel() else 0.0
        assert error <= rel * scale + floor, (
            f"{self.name} {key}: off by {error:.3e} where the largest is {scale:.3e} (rel {rel:g})"
        )

    def equal(self, key: str, actual: torch.Tensor) -> None:
        """Exactly the recorded values."""
        recorded = self.tensors[key]
        assert torch.equal(actual.to(recorded.dtype), recorded), f"{self.name} {key}: differs"


def check(*prefixes: str) -> Callable:
    """Registers a function for the files whose names start with one of the prefixes."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        for prefix in prefixes:
            assert prefix not in CHECKS, f"two checks claim {prefix}"
            CHECKS[prefix] = function
        return function

    return register


def files() -> list[Path]:
    """Every recorded case of the folder."""
    return sorted(FOLDER.glob("*.safetensors"))


def check_for(name: str) -> Callable[[Case], None] | None:
    """The check with the longest prefix that matches, or None."""
    matching = [prefix for prefix in CHECKS if name.startswith(prefix)]
    return CHECKS[max(matching, key=len)] if matching else None
