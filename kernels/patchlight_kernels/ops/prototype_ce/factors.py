"""fp32 values as fp16 factors: a power of two for each tensor brings its largest value below 2^15, so any finite input fits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PRODUCTS = ("fp16", "fp16x3", "fp32")  # what fp32 rows and prototypes are multiplied as
TOP = 2.0**14  # the power of two of the largest value; fp16 ends at 2^16
LIFT = 2.0**11  # what the residual of a gradient is multiplied by: it is 2^-11 of the value or less


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is not above x (fp32, not negative); 2^-100 for less, inf for inf and NaN."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**-100)


def scales(*tensors: Tensor) -> Tensor:
    """A power of two for each tensor: divided by it, its largest absolute value is at least 2^14 and less than 2^15."""
    largest = [
        torch.linalg.vector_norm(x, math.inf, dtype=torch.float32) if x.numel() else x.new_zeros(()) for x in tensors
    ]
    return power_of_two(torch.stack(largest)) / TOP


def half(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in fp16, contiguous."""
    if torch.compiler.is_compiling():
        return (x * scale.reciprocal()).half()  # one kernel; without a compiler the product would be written in fp32
    return torch.mul(x, scale.reciprocal(), out=torch.empty(x.shape, dtype=torch.float16, device=x.device))


def split(x: Tensor, lift: float = 1.0) -> tuple[Tensor, Tensor]:
    """fp32 values as two fp16 parts: x = first + second / lift, to 23 bits.

    The first is rounded to 11 bits by its bits: a compiler may leave out a cast to fp16 and back, and the second would be 0.
    """
    first = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return first.half(), ((x - first) * lift).half()


def student_factor(x: Tensor, scale: Tensor, products: str) -> Tensor:
    """x / scale as [..., D] for "fp16"; for "fp16x3" as [..., 3 D], so that one product with `prototype_factor` has all three."""
    if products == "fp16":
        return half(x, scale)
    first, second = split(x / scale)
    return torch.cat((first, first, second), -1)


def prototype_factor(x: Tensor, scale: Tensor, products: str) -> Tensor:
    """The other side of `student_factor`: first first + first second + second first."""
    if products == "fp16":
        return half(x, scale)
    first, second = split(x / scale)
    return torch.cat((first, second, first), -1)


def of(
    z: Tensor, prototypes: Tensor, teacher_z: Tensor, teacher_prototypes: Tensor, products: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The four as factors, and their scales."""
    of_each = scales(z, prototypes, teacher_z, teacher_prototypes)
    rows = [student_factor(x, of_each[i], products) for x, i in ((z, 0), (teacher_z, 2))]
    tables = [prototype_factor(x, of_each[i], products) for x, i in ((prototypes, 1), (teacher_prototypes, 3))]
    return (rows[0], tables[0], rows[1], tables[1]), of_each


def width(factor: Tensor, products: str) -> int:
    """The width of the tensor that the factor was made from."""
    return factor.shape[-1] // (3 if products == "fp16x3" else 1)


def values(factor: Tensor, scale: Tensor, products: str) -> Tensor:
    """What the factor stands for, in fp32."""
    if products == "fp16":
        return factor.float() * scale
    _, second, third = factor.float().chunk(3, -1)  # on either side these are both parts
    return (second + third) * scale
