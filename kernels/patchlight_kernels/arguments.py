"""What the ops share about their arguments: dtypes, dense rows, and the one form of an error."""

from __future__ import annotations

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


def check_float(op: str, name: str, value: object, remedy: str) -> None:
    """A TypeError for a tensor: reading one from a GPU would wait for it."""
    if isinstance(value, Tensor):
        raise TypeError(message(op, f"{name} must be a Python float", "a tensor", remedy))


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
