"""What the ops share about their arguments: kinds, ranges and dtypes, dense rows, and the one form of an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 runs the reference


def message(op: str, rule: str, got: object, remedy: str) -> str:
    """The one form of every error about an argument."""
    return f"{op}: {rule}, got {got}; {remedy}."


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """A TypeError unless some implementation takes the dtype."""
    if dtype not in (*FAST_DTYPES, torch.float64):
        raise TypeError(message(op, f"{name} must be float32, bfloat16, float16 or float64", dtype, "cast it"))


def check_same_dtype(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """A TypeError unless both tensors have one dtype."""
    if x.dtype != other.dtype:
        raise TypeError(message(op, f"{name} must be {other.dtype} like {other_name}", x.dtype, "cast one of them"))


def kind_of(value: object) -> str:
    """What an argument is, in the words of an error."""
    name = type(value).__name__
    return name if type(value).__module__ == "builtins" else f"{type(value).__module__.split('.')[0]}.{name}"


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """A TypeError unless all are tensors; None is for the caller to judge."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            remedy = (
                "call torch.from_numpy on it" if kind_of(value) == "numpy.ndarray" else "call torch.as_tensor on it"
            )
            raise TypeError(message(op, f"{name} must be a tensor", kind_of(value), remedy))


def check_tensor_list(op: str, name: str, values: Sequence[Tensor | None], optional: bool = False) -> None:
    """A TypeError unless it is a list or tuple of tensors; `optional`: or of None."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(message(op, f"{name} must be a list of tensors", kind_of(values), "put them into a list"))
    for number, value in enumerate(values):
        if value is None and not optional:
            raise TypeError(
                message(op, f"{name}[{number}] must be a tensor", None, "leave it out, or pass an empty one")
            )
        check_tensors(op, **{f"{name}[{number}]": value})


def check_required(op: str, **tensors: Tensor) -> None:
    """A TypeError unless all are tensors."""
    for name, value in tensors.items():
        if value is None:
            raise TypeError(message(op, f"{name} must be a tensor", None, "pass one"))
    check_tensors(op, **tensors)


def check_integer(op: str, name: str, value: object, remedy: str, bits: int = 32) -> None:
    """A TypeError unless it is a Python integer, a ValueError unless it has at most so many bits."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(message(op, f"{name} must be a Python integer", kind_of(value), remedy))
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise ValueError(message(op, f"{name} must be an integer of {bits} bits", value, remedy))


def check_grid(op: str, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns), or an error unless these are two positive integers with a product below 2^31."""
    rule, remedy = "grid must be (rows, columns) of the patches", "pass two Python integers"
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(message(op, rule, grid if isinstance(grid, (tuple, list)) else kind_of(grid), remedy))
    for number, size in enumerate(grid):
        check_integer(op, f"grid[{number}]", size, remedy)
    height, width = grid
    if height < 1 or width < 1 or height * width >= 2**31:
        got = f"{height}x{width}"
        raise ValueError(
            message(op, f"{rule}, each at least 1, fewer than 2^31 patches", got, "pass the grid of patches")
        )
    return height, width


def check_flag(op: str, name: str, value: object) -> None:
    """A TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(message(op, f"{name} must be True or False", kind_of(value), "call bool on it"))


def check_float(op: str, name: str, value: Any, remedy: str) -> None:
    """An error unless it is a positive finite number; not a tensor: reading one from a GPU would wait for it."""
    check_number(op, name, value, remedy)
    if not 0 < value <= sys.float_info.max:
        raise ValueError(message(op, f"{name} must be positive and finite", value, remedy))


def check_number(op: str, name: str, value: object, remedy: str) -> None:
    """A TypeError unless it is a Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        got = "a tensor" if isinstance(value, Tensor) else kind_of(value)
        raise TypeError(message(op, f"{name} must be a Python float", got, remedy))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_dense_rows(x: Tensor) -> Tensor:
    """The same tensor, copied if the values of its last dimension are not adjacent."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def with_near_rows(x: Tensor) -> Tensor:
    """The same tensor, copied if offsets within its last two dimensions exceed 32 bits."""
    (rows, width), strides = x.shape[-2:], x.stride()[-2:]
    return x if rows * strides[0] + width * strides[1] < 2**31 else x.contiguous()
