"""What tests and benchmarks know of an op: its cases, inputs, traffic, and what of a result is compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dispatch import Op, ops

SEEDS = 1_000_003  # how far apart two seeds of a case are: more than any two cases


@dataclass(frozen=True)
class Case:
    """One size of an op. `sizes` is read by the op's own spec only."""

    name: str
    sizes: Mapping[str, Any]
    small: bool = False  # a benchmark case that a laptop finishes in a second

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class OpSpec:
    """Everything that tests and benchmarks need, so that neither repeats the other.

    `inputs(case, dtype, device, seed=0)` gives the public function's keyword arguments, random ones by the case and the seed.
    `observe(arguments, output)` gives the tensors that are compared between implementations, in float64: for an op that
    chooses, what its choice is worth, as two right answers may differ in a tie.
    `differentiable` names the arguments whose gradients are compared too.
    `sample(arguments, output)` cuts both to a part that float64 on a CPU can check, for large cases.
    `min_bytes(case, dtype)` and `flops(case)` are the least a forward must move and compute. A backward moves twice that,
    and computes `backward_flops(case)`, by default twice that.
    `saved_sums(arguments)` gives the log-sum-exps that a backward reads, in a shape that multiplies the output.
    """

    op: Op
    public: Callable
    tests: tuple[Case, ...]
    benches: tuple[Case, ...]
    inputs: Callable[..., dict[str, Any]]
    observe: Callable[[dict[str, Any], Any], dict[str, Tensor]]
    min_bytes: Callable[[Case, torch.dtype], int]
    flops: Callable[[Case], int]
    backward_flops: Callable[[Case], int] | None = None
    differentiable: tuple[str, ...] = ()
    saved_sums: Callable[[dict[str, Any]], Tensor] | None = None
    sample: Callable[[dict[str, Any], Any], tuple[dict[str, Any], Any]] = lambda arguments, output: (arguments, output)

    @property
    def name(self) -> str:
        return self.op.name

    def least(self, case: Case, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        """Bytes and flops that no implementation can do without, forward alone or with backward."""
        return self.min_bytes(case, dtype) * (3 if backward else 1), self.least_flops(case, backward)

    def least_flops(self, case: Case, backward: bool) -> int:
        computed = self.flops(case)
        if not backward:
            return computed
        return computed + (2 * computed if self.backward_flops is None else self.backward_flops(case))


def names() -> list[str]:
    """Every folder under ops/ is an op."""
    return sorted(path.name for path in (Path(__file__).parent / "ops").iterdir() if (path / "op.py").exists())


def spec(name: str) -> OpSpec:
    """The spec of one op."""
    found = importlib.import_module(f"{__package__}.ops.{name}.spec").SPEC
    assert found.op is ops()[name]
    return found


def specs() -> list[OpSpec]:
    """The specs of all ops."""
    return [spec(name) for name in names()]
