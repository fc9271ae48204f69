"""square_sums: the sum of squares of each of many tensors, in two launches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import extension, hardware
from ...addresses import Rows, addresses_of, blocks_of, first_blocks, table_of
from ...arguments import accumulator, check_dtype, check_same_dtype, check_tensor_list, message
from ...dispatch import Impl, Op, first_reason, triton_call
from . import reference

OP_NAME = "square_sums"


def _bind(tensors: Sequence[Tensor]) -> tuple:
    """Checks the public arguments and returns those that implementations take."""
    check_tensor_list(OP_NAME, "tensors", tensors)
    if not tensors:
        raise ValueError(message(OP_NAME, "there must be tensors", "none", "do not call it then"))
    first = tensors[0]
    check_dtype(OP_NAME, "tensors[0]", first.dtype)
    for number, tensor in enumerate(tensors):
        check_same_dtype(OP_NAME, f"tensors[{number}]", tensor, "tensors[0]", first)
        if tensor.device != first.device:
            rule = f"tensors[{number}] must be on {first.device} like tensors[0]"
            raise ValueError(message(OP_NAME, rule, tensor.device, "move it"))
    return ([tensor.detach().contiguous() for tensor in tensors],)


def rows_of(tensors: Sequence[Tensor]) -> tuple[Rows, tuple[int, ...]]:
    """The table of the kernels, and how many values each tensor has."""
    counts = tuple([tensor.numel() for tensor in tensors])
    return (counts, first_blocks(counts), addresses_of(tensors)), counts


def _native_fwd(tensors: list[Tensor]) -> Tensor:
    rows, counts = rows_of(tensors)
    device = tensors[0].device
    return extension.native("square_sums_fwd")(table_of(rows, device), blocks_of(counts, device), tensors[0].dtype)


def _unsupported_by_all(tensors: list[Tensor]) -> str | None:
    if all(tensor.numel() == 0 for tensor in tensors):
        return "there is nothing to compute"
    return hardware.unsupported_by_all(tensors[0].dtype)


def _cuda_unsupported(tensors: list[Tensor]) -> str | None:
    return first_reason(_unsupported_by_all(tensors), hardware.no_cuda_library(tensors[0], "square_sums_fwd"))


def _cpp_unsupported(tensors: list[Tensor]) -> str | None:
    return first_reason(_unsupported_by_all(tensors), hardware.no_cpu_library(tensors[0], "square_sums_fwd"))


def _triton_unsupported(tensors: list[Tensor]) -> str | None:
    return first_reason(_unsupported_by_all(tensors), hardware.no_triton(tensors[0]))


OP = Op(
    OP_NAME,
    bind=_bind,
    impls=(
        Impl("cuda", _native_fwd, _cuda_unsupported),
        # Before Triton, which takes CPU tensors in its slow interpreter only.
        Impl("cpp", _native_fwd, _cpp_unsupported),
        Impl("triton", triton_call(__package__, "square_sums_fwd"), _triton_unsupported),
        Impl("reference", reference.square_sums_fwd, lambda *args: None),
    ),
)


def _fake(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=accumulator(tensors[0].dtype))


_fwd = OP.define("fwd", "(Tensor[] tensors) -> Tensor", run=OP.forward, fake=_fake)


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor: the norms of all gradients in two launches, without atomics.

    Args:
        tensors: any number and any shapes, of one dtype: fp32, bf16 or fp16 (fp64 runs the reference). Other layouts than
            contiguous ones are copied.

    Returns:
        [P] fp32; 0 for a tensor without values.

    No gradient. The result does not depend on threads or on the other tensors, bit for bit. Traffic: every value is read once.
    """
    return _fwd(*_bind(tensors))
