"""What tests and benchmarks know of an op: its cases, inputs, costs, and what of a result is compared."""

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


def observe_output(arguments: dict[str, Any], output: Tensor) -> dict[str, Tensor]:
    """Of an op that returns features: those."""
    return {"out": output.double()}


def observe_loss(arguments: dict[str, Any], output: Tensor) -> dict[str, Tensor]:
    """Of an op that returns a loss: that."""
    return {"loss": output.double()}


def keep_all(arguments: dict[str, Any], output: Any) -> tuple[dict[str, Any], Any]:
    """The `sample` of an op whose large cases float64 on a CPU can check."""
    return arguments, output


def first_images(count: int, *names: str) -> Callable[[dict[str, Any], Any], tuple[dict[str, Any], Any]]:
    """A `sample`: the first `count` images of the output and of the named arguments; one row that serves all images stays."""

    def sample(arguments: dict[str, Any], output: Any) -> tuple[dict[str, Any], Any]:
        cut = {name: None if arguments[name] is None else arguments[name][:count] for name in names}
        several = isinstance(output, tuple)
        return arguments | cut, tuple(part[:count] for part in output) if several else output[:count]

    return sample


def generator(seed: int, first: int, second: int) -> torch.Generator:
    """Random numbers for a case; two of its sizes distinguish it from others."""
    return torch.Generator().manual_seed(seed * SEEDS + first * 1000 + second)


@dataclass(frozen=True)
class OpSpec:
    """Everything that tests and benchmarks need, so that neither repeats the other.

    `inputs(case, dtype, device, seed=0)` gives the public function's keyword arguments, random ones by the case and the seed.
    `min_bytes(case, dtype)` and `flops(case)` are the least a forward must move and compute. A backward moves twice that,
    and computes `backward_flops(case)`, by default twice that.
    `observe(arguments, output)` gives the tensors that are compared between implementations, in float64: for an op that
    chooses, the values of what it chose, as two right answers may differ in a tie.
    `differentiable` names the arguments whose gradients are compared too.
    `saved_sums(arguments)` gives the log-sum-exps that a backward reads, in a shape that multiplies the output.
    `compiled` are sizes that no benchmark runs on a CPU as a GPU would: kernels are compiled for them too.
    `sample(arguments, output)` cuts both to a part that float64 on a CPU can check, for large cases.
    `unpack(arguments)` makes the arguments of an op that takes lists of tensors out of inputs without lists.
    """

    op: Op
    public: Callable
    tests: tuple[Case, ...]
    benches: tuple[Case, ...]
    inputs: Callable[..., dict[str, Any]]
    min_bytes: Callable[[Case, torch.dtype], int]
    flops: Callable[[Case], int]
    backward_flops: Callable[[Case], int] | None = None
    observe: Callable[[dict[str, Any], Any], dict[str, Tensor]] = observe_output
    differentiable: tuple[str, ...] = ()
    saved_sums: Callable[[dict[str, Any]], Tensor] | None = None
    compiled: tuple[Case, ...] = ()
    sample: Callable[[dict[str, Any], Any], tuple[dict[str, Any], Any]] = keep_all
    unpack: Callable[[dict[str, Any]], dict[str, Any]] = dict

    @property
    def name(self) -> str:
        return self.op.name

    def bind(self, arguments: dict[str, Any]) -> tuple:
        """What the op's implementations take."""
        return self.op.bind(**self.unpack(arguments))

    def least(self, case: Case, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        """Bytes and flops that every implementation needs, forward alone or with backward."""
        return self.min_bytes(case, dtype) * (3 if backward else 1), self.least_flops(case, backward)

    def least_flops(self, case: Case, backward: bool) -> int:
        forward = self.flops(case)
        if not backward:
            return forward
        return forward + (2 * forward if self.backward_flops is None else self.backward_flops(case))


def names() -> list[str]:
    """Every folder under ops/ with an op.py is an op."""
    return sorted(path.name for path in (Path(__file__).parent / "ops").iterdir() if (path / "op.py").exists())


def spec(name: str) -> OpSpec:
    """The spec of one op."""
    found = importlib.import_module(f"{__package__}.ops.{name}.spec").SPEC
    assert found.op is ops()[name]
    return found


def specs() -> list[OpSpec]:
    """The specs of all ops."""
    return [spec(name) for name in names()]
