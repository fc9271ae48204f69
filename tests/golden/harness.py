"""Reads recorded numbers of the released code. Each file is a case; a check is registered for a prefix of names.

    @check("dino_loss")
    def dino_loss(case): case.close("output.loss", my_loss(case["input.student"]), rel=1e-5)

`$PATCHLIGHT_GOLDEN` points to another folder. The longest matching prefix wins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest
import torch
from safetensors import safe_open

FOLDER = Path(os.environ.get("PATCHLIGHT_GOLDEN", Path(__file__).parent))
Value = TypeVar("Value")
# Beginnings of names in the released heads, and in ours, for `renamed`.
HEAD_NAMES = {
    r"last_layer\.": "prototypes.",
    r"last_layer2\.": "own_patch_prototypes.",
    r"mlp\.(?=weight|bias)": "mlp.0.",  # a head with a single layer has no list of layers there
}
SUMMARY_NAMES = {r"cls_blocks\.(\d+)\.attn\.": r"blocks.\1.", r"cls_blocks\.": "blocks."}
CHECKS: dict[str, Callable[[Case], None]] = {}


class Case:
    """One recorded case: tensors by key, the configuration that made them, and comparisons that name what differs."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
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

    def skip_unless(self, **supported: object) -> None:
        """Skips the case if an option of its configuration has another value than the only one that we support."""
        for name, value in supported.items():
            recorded = self.config.get(name, parse_value(self.meta[name]) if name in self.meta else value)
            if recorded != value:
                skip_unsupported(f"{name} is {recorded} in the recording and always {value} here")

    def numbered(self, prefix: str) -> Iterator[torch.Tensor]:
        """The tensors called `prefix` and a number, in the order of their numbers."""
        numbers = sorted(int(rest) for rest in self.under(prefix) if rest.isdigit())
        assert numbers, f"{self.name}: no {prefix}<number>"
        return (self.tensors[f"{prefix}{number}"] for number in numbers)

    def step_count(self) -> int:
        """How many consecutive calls are recorded, as step0., step1. and so on."""
        return len({key.partition(".")[0] for key in self.tensors if re.match(r"step\d+\.", key)})

    def close(self, key: str, actual: torch.Tensor, rel: float, floor: float | torch.Tensor = 0.0) -> None:
        """|actual - recorded| <= rel * max|recorded| + floor everywhere, with both shapes equal."""
        recorded = self.tensors[key].double()
        actual = actual.detach().double()
        assert actual.shape == recorded.shape, (
            f"{self.name} {key}: shape {tuple(actual.shape)}, recorded {tuple(recorded.shape)}"
        )
        if not recorded.numel():
            return
        off, scale = (actual - recorded).abs(), recorded.abs().max().item()
        allowed = torch.as_tensor(rel * scale + floor, dtype=torch.float64).expand_as(off)
        worst = (off - allowed).argmax()
        assert (off <= allowed).all(), (
            f"{self.name} {key}: off by {off.flatten()[worst]:.3e} where {allowed.flatten()[worst]:.3e} is allowed "
            f"and the largest is {scale:.3e} (rel {rel:g})"
        )

    def equal(self, key: str, actual: torch.Tensor) -> None:
        """Exactly the recorded values."""
        recorded = self.tensors[key]
        assert torch.equal(actual.to(recorded.dtype), recorded), f"{self.name} {key}: differs"


def parse_value(text: str) -> object:
    """The number that a string of the metadata stands for, if it does."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def renamed(tensors: dict[str, Value], names: dict[str, str]) -> dict[str, Value]:
    """The same tensors under our names: `names` maps regular expressions for beginnings to ours; the first match counts."""
    result = {}
    for name, value in tensors.items():
        pattern = next((old for old in names if re.match(old, name)), "")
        result[re.sub(f"^{pattern}", names.get(pattern, ""), name)] = value
    assert len(result) == len(tensors), "two tensors have become one"
    return result


def linear_layers(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """How many matrices there are under a prefix; a head with a single layer has no numbers."""
    return sum(name.startswith(prefix) and value.ndim == 2 for name, value in weights.items())


def summary_depth(weights: dict[str, torch.Tensor], prefix: str = "") -> int:
    """Blocks of a recorded class-attention summary, each with the matrices q, k, v, proj and two of an MLP."""
    return linear_layers(weights, f"{prefix}cls_blocks.") // 6


@cache
def load_checks() -> None:
    """Imports every check_*.py, once."""
    for module in sorted(Path(__file__).parent.glob("check_*.py")):
        spec = importlib.util.spec_from_file_location(module.stem, module)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def check(*prefixes: str) -> Callable:
    """Registers a function for the files whose names start with one of the prefixes."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        for prefix in prefixes:
            assert prefix not in CHECKS, f"two checks are registered for {prefix}"
            CHECKS[prefix] = function
        return function

    return register


def skip_unsupported(what: str) -> NoReturn:
    """For an option of the released code that we do not have: the case is reported as skipped, not as passed."""
    pytest.skip(f"not covered: {what}")


def files() -> list[Path]:
    """Every recorded case of the folder."""
    return sorted(FOLDER.glob("*.safetensors"))


def check_for(name: str) -> Callable[[Case], None] | None:
    """The check with the longest prefix that matches, or None."""
    matching = [prefix for prefix in CHECKS if name.startswith(prefix)]
    return CHECKS[max(matching, key=len)] if matching else None
