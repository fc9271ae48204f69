"""Tables of addresses, with which one kernel works on many tensors.

A table is int64 [rows, tensors] on the device of the tensors. Each block of a kernel takes a chunk of one tensor; `blocks_of`
says which. A kernel that a CUDA graph replays reads the same tables each time, so they stay in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 4096  # values that a block works on, as kChunkValues in csrc/addresses.h
MOST_RECENT = 8  # tables that are kept: gradients take turns at a few addresses

Rows = tuple[tuple[int, ...], ...]

_recent: OrderedDict[tuple[torch.device, Rows], tuple[Tensor, ...]] = OrderedDict()
_spare: dict[tuple[torch.device, int, int], tuple[Tensor, Tensor]] = {}
_of_graphs: list[tuple[Tensor, ...]] = []


def table_of(rows: Rows, device: torch.device) -> Tensor:
    """The rows on the device. The rows of one of the last calls are not copied again; the copy does not wait for the device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = (device, rows)
    if key in _recent:
        _recent.move_to_end(key)
        made = _recent[key]
    else:
        made = _copied(rows, device, capturing)
        if not capturing:  # a copy within a graph happens at its replay
            _recent[key] = made
            while len(_recent) > MOST_RECENT:
                _recent.popitem(last=False)
    if capturing:
        _of_graphs.append(made)
    return made[0]


def _copied(rows: Rows, device: torch.device, capturing: bool) -> tuple[Tensor, ...]:
    """The table on the device, and the pinned memory that it is copied from."""
    values = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return (values,)
    shape = (device, len(rows), len(rows[0]))
    # While a graph is captured no pinned memory can be allocated: that of an earlier call is at hand.
    on_device, pinned = _spare.pop(shape) if shape in _spare else _pair(values, device)
    if not capturing:
        _spare.setdefault(shape, _pair(values, device))
    on_device.copy_(pinned.copy_(values), non_blocking=True)
    return on_device, pinned


def _pair(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values, device=device), torch.empty_like(values, pin_memory=True)


def addresses_of(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """A row: the address of each tensor, 0 for None and for one without values."""
    return tuple([0 if tensor is None or not tensor.numel() else tensor.data_ptr() for tensor in tensors])


@cache
def blocks_of(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [2, blocks]: for each block its tensor, and which chunk of it. `counts`: how many values each tensor has."""
    chunks = torch.tensor([-(-count // CHUNK) for count in counts], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(counts)), chunks)
    first = chunks.cumsum(0) - chunks
    return torch.stack([tensor, torch.arange(len(tensor)) - first[tensor]]).int().to(device)


def first_blocks(counts: Sequence[int]) -> tuple[int, ...]:
    """A row: the first block of each tensor."""
    found, block = [], 0
    for count in counts:
        found.append(block)
        block += -(-count // CHUNK)
    return tuple(found)


def aligned(rows: Rows) -> bool:
    """Whether all addresses are multiples of 16 bytes, so that four values can be read at once."""
    return not any(address % 16 for row in rows for address in row)
