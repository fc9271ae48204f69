"""What is counted: an operation's call, and the kernels that it launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

# Kinds of FLOPs, as they are listed.
PRODUCTS_16, PRODUCTS_32, ATTENTION, ELEMENTWISE = "products in 16 bit", "products in fp32", "attention", "elementwise"
FLOP_KINDS = (PRODUCTS_16, PRODUCTS_32, ATTENTION, ELEMENTWISE)
HOST_READ, HOST_COPY = WAITS = "host read", "host copy"  # kinds of copies for which the host waits
# Phases of a step, in order.
TEACHER, CUE, STUDENT, OBJECTIVE, BACKWARD, REST = PHASES = (
    "teacher", "cue", "student", "objective", "backward", "update and rest"
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch. `kind` names the constants of its time in bench/hardware; `blocks` counts an attention's blocks."""

    name: str
    kind: str
    bytes: int = 0  # read and written
    flops: int = 0
    flop_kind: str = ELEMENTWISE
    blocks: int = 0


@dataclass(frozen=True)
class Launch:
    phase: str
    kernel: Kernel
    place: str = ""  # the line of our code, where the host waits


@dataclass(frozen=True)
class Call:
    """An operation with what it got and what it returned."""

    name: str  # without the overload: "aten.mm"
    args: tuple
    kwargs: dict
    result: Any
    names: tuple[str, ...] = ()  # of the arguments
    written: frozenset[str] = frozenset()  # those that are changed in place

    @property
    def given(self) -> list[Tensor]:
        """Without tensors that the result is written into."""
        return tensors_in((self.args, {name: value for name, value in self.kwargs.items() if name != "out"}))

    @property
    def returned(self) -> list[Tensor]:
        return tensors_in(self.result)

    def argument(self, name: str) -> Any:
        return self.args[self.names.index(name)]

    @property
    def changed(self) -> list[Tensor]:
        """Arguments that are changed in place, and are not results."""
        return tensors_in([value for name, value in zip(self.names, self.args, strict=False) if name in self.written])

    @property
    def on_host(self) -> bool:
        return all(x.device.type == "cpu" for x in (*self.given, *self.returned))


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(x: Tensor) -> int:
    """Bytes that a kernel moves to read or write the tensor once; a broadcast dimension is read once."""
    real = prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
    return real * x.element_size()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(map(size_of, tensors))
