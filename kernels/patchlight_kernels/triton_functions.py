"""Functions that the Triton kernels of several ops call."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import hardware

INTERPRETED = tl.constexpr(hardware.triton_interpreted())
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-3.0e38)  # a finite stand-in for the maximum of values that are all -inf


@triton.jit
def append(items, item):
    """The tuple `items` with `item` at its end: Triton does not take `(*items, item)`."""
    return items + (item,)  # noqa: RUF005


@triton.jit
def at_most_zero(x):
    """x, or 0 where it is above; NaN stays. A score minus its row's log-sum-exp is above 0 by rounding alone, which in large
    scores is large."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def store(ptr, x, mask):
    """Stores fp32 values in the tensor's dtype. The interpreter would cut bf16 off, so there it is rounded by hand."""
    if INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, sums):
    """sums + a b in fp32 (sums may be None). fp32 is not multiplied as tf32; an fp32 `a` beside a 16-bit `b` is rounded."""
    if INTERPRETED or b.dtype == tl.float32:  # the interpreter multiplies bf16 wrongly
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, sums)
