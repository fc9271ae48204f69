"""Triton kernels of square_sums: a sum for every chunk, then a sum for every tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...addresses import CHUNK, aligned, blocks_of, table_of
from .op import rows_of

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CHUNK = tl.constexpr(CHUNK)


@triton.jit
def _chunk_kernel(
    table_ptr,  # [3, tensors] int64: values, first block, address
    blocks_ptr,  # [2, blocks] int32: tensor, chunk
    sums_ptr,  # [blocks] fp32
    tensors,
    blocks,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses are multiples of 16
):
    """The sum of squares of one chunk."""
    block = tl.program_id(0)
    tensor = tl.load(blocks_ptr + block)
    first = tl.load(blocks_ptr + blocks + block).to(tl.int64) * _CHUNK
    count = tl.load(table_ptr + tensor) - first
    offs = tl.arange(0, _CHUNK)
    address = tl.load(table_ptr + 2 * tensors + tensor) + first * (TYPE.primitive_bitwidth // 8)
    start = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    if count >= _CHUNK:  # without a mask four values are read at once
        x = tl.load(start + offs).to(tl.float32)
    else:
        x = tl.load(start + offs, mask=offs < count, other=0).to(tl.float32)
    tl.store(sums_ptr + block, tl.sum(x * x, axis=0))


@triton.jit
def _tensor_kernel(table_ptr, sums_ptr, out_ptr, tensors, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the chunks of one tensor, BLOCK in each round; the largest tensor needs all ROUNDS."""
    tensor = tl.program_id(0)
    chunks = (tl.load(table_ptr + tensor) + _CHUNK - 1) // _CHUNK
    sums_ptr += tl.load(table_ptr + tensors + tensor)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, ROUNDS * BLOCK, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + offs, mask=offs < chunks, other=0)
    tl.store(out_ptr + tensor, tl.sum(total, axis=0))


def square_sums_fwd(tensors: list[Tensor]) -> Tensor:
    """Raw arguments as `patchlight::square_sums_fwd`."""
    rows, counts = rows_of(tensors)
    device = tensors[0].device
    table, blocks = table_of(rows, device), blocks_of(counts, device)
    sums = torch.empty(blocks.shape[1], device=device)
    out = torch.empty(len(tensors), device=device)
    kind, fits = TYPES[tensors[0].dtype], aligned(rows[2:])
    _chunk_kernel[(len(sums),)](table, blocks, sums, len(tensors), len(sums), TYPE=kind, ALIGNED=fits, num_warps=4)
    rounds = triton.cdiv(max(counts), CHUNK * 512)
    _tensor_kernel[(len(tensors),)](table, sums, out, len(tensors), ROUNDS=rounds, BLOCK=512, num_warps=4)
    return out
