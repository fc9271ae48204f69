"""Triton kernels of neighbor_topk: windows gather their few candidates, everything else goes through tiles of the Gram matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import with_near_rows
from ...triton_functions import dot
from ...tuning import autotune
from .reference import EPS, NAN_RANK, capacity

_EPS = tl.constexpr(EPS)
_NAN_RANK = tl.constexpr(NAN_RANK)


@triton.jit
def _block(PATCHES: tl.constexpr, BLOCK: tl.constexpr):
    """The program's image, and the numbers of its BLOCK patches."""
    blocks = tl.cdiv(PATCHES, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    return image, (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load(x_ptr, stride, patch, mask, offs_d, CHANNELS: tl.constexpr):
    """Channels offs_d of some patches [patches, channels], zeros where masked."""
    mask = mask[:, None] & (offs_d < CHANNELS)[None, :]
    return tl.load(x_ptr + patch[:, None] * stride + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _cosine(product, square, other_square):
    """The cosine from a dot product and two squared norms; NaN if one of them overflowed."""
    cosine = product / (tl.maximum(tl.sqrt(square), _EPS) * tl.maximum(tl.sqrt(other_square), _EPS))
    return tl.where((square < float("inf")) & (other_square < float("inf")), cosine, float("nan"))


@triton.jit
def _rank(cosine, present):
    """What candidates are ordered by: NaN below every cosine, missing candidates below that."""
    return tl.where(present, tl.where(cosine == cosine, cosine, _NAN_RANK), -float("inf"))


@triton.jit
def _window_candidates(
    y, x, place, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RADIUS: tl.constexpr, WRAP: tl.constexpr
):
    """Which places of a patch's window are candidates, and their numbers [patches, places]; missing ones after all others."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    CANDIDATES: tl.constexpr = SIDE * SIDE - 1
    cell = tl.where(place < CANDIDATES // 2, place, place + 1)
    near_y = y[:, None] + (cell // SIDE - RADIUS)[None, :]
    near_x = x[:, None] + (cell % SIDE - RADIUS)[None, :]
    real = tl.broadcast_to((place < CANDIDATES)[None, :], near_y.shape)
    if not WRAP:
        real = real & (near_y >= 0) & (near_y < HEIGHT) & (near_x >= 0) & (near_x < WIDTH)
    wrapped = ((near_y + HEIGHT) % HEIGHT) * WIDTH + (near_x + WIDTH) % WIDTH
    return real, tl.where(real, wrapped, HEIGHT * WIDTH + place[None, :])


WINDOW_CONFIGS = [
    triton.Config({"BLOCK_N": 16, "BLOCK_D": 128, "TOGETHER": 2}, num_warps=4),
    triton.Config({"BLOCK_N": 16, "BLOCK_D": 128, "TOGETHER": 4}, num_warps=4),
    triton.Config({"BLOCK_N": 32, "BLOCK_D": 64, "TOGETHER": 4}, num_warps=4),
    triton.Config({"BLOCK_N": 32, "BLOCK_D": 128, "TOGETHER": 4}, num_warps=8),
]


@autotune(WINDOW_CONFIGS, key=["HEIGHT", "WIDTH", "CHANNELS", "RADIUS"])
@triton.jit
def _window_kernel(
    x_ptr,  # [images, HEIGHT * WIDTH, CHANNELS]
    index_ptr,  # [images, HEIGHT * WIDTH, K] int32
    score_ptr,  # [images, HEIGHT * WIDTH, K] fp32, if HAS_SCORE
    stride_image,
    stride_patch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    RADIUS: tl.constexpr,
    PLACES: tl.constexpr,  # candidates, rounded up to a power of two
    WRAP: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,  # candidates that are loaded at the same time
):
    """BLOCK_N patches: dot products and squares of the whole window in one pass over the channels, then K rounds of arg max."""
    PATCHES: tl.constexpr = HEIGHT * WIDTH
    SIDE: tl.constexpr = 2 * RADIUS + 1
    CANDIDATES: tl.constexpr = SIDE * SIDE - 1
    image, offs_n = _block(PATCHES, BLOCK_N)
    mask_n = offs_n < PATCHES
    y = offs_n // WIDTH
    x = offs_n % WIDTH
    place = tl.arange(0, PLACES)
    x_ptr += image * stride_image

    dots = tl.zeros((BLOCK_N, PLACES), tl.float32)  # [BLOCK_N, PLACES]
    squares = tl.zeros((BLOCK_N, PLACES), tl.float32)  # [BLOCK_N, PLACES]
    own_square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, CHANNELS, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        own = _load(x_ptr, stride_patch, offs_n, mask_n, offs_d, CHANNELS).to(tl.float32)
        own_square += tl.sum(own * own, axis=1)
        for c in tl.range(0, CANDIDATES, loop_unroll_factor=TOGETHER):
            cell = tl.where(c < CANDIDATES // 2, c, c + 1)  # the window without its middle
            # Outside a clipped border this reads some patch of the image, and the result is masked below.
            near_y = (y + (cell // SIDE - RADIUS) + HEIGHT) % HEIGHT
            near_x = (x + (cell % SIDE - RADIUS) + WIDTH) % WIDTH
            near = near_y * WIDTH + near_x
            other = _load(x_ptr, stride_patch, near, mask_n, offs_d, CHANNELS).to(tl.float32)
            dots += tl.where((place == c)[None, :], tl.sum(own * other, axis=1)[:, None], 0.0)
            squares += tl.where((place == c)[None, :], tl.sum(other * other, axis=1)[:, None], 0.0)

    real, candidate = _window_candidates(y, x, place, HEIGHT, WIDTH, RADIUS, WRAP)
    cosine = tl.where(real, _cosine(dots, own_square[:, None], squares), -float("inf"))
    rank = _rank(cosine, real)
    out = (image * PATCHES + offs_n) * K
    for s in range(K):
        best = tl.max(rank, axis=1)
        chosen = tl.min(tl.where(rank == best[:, None], candidate, PATCHES + PLACES), axis=1)  # ties: lower index
        taken = candidate == chosen[:, None]
        tl.store(index_ptr + out + s, tl.where(chosen < PATCHES, chosen, -1), mask=mask_n)
        if HAS_SCORE:
            score = tl.sum(tl.where(taken & real, cosine, 0.0), axis=1)
            tl.store(score_ptr + out + s, tl.where(chosen < PATCHES, score, -float("inf")), mask=mask_n)
        rank = tl.where(taken, -float("inf"), rank)
        candidate = tl.where(taken, PATCHES + PLACES, candidate)


# fp32 products do not use tensor cores and keep their operands in registers, so steps are short.
FLOAT32_GRAM_CONFIGS = [
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, num_warps=8, num_stages=2),
]
GRAM_CONFIGS = [
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8, num_stages=3),
]


@triton.jit
def _apart(a, b, SIZE: tl.constexpr, WRAP: tl.constexpr):
    """Distance along one axis of the grid."""
    distance = tl.abs(a - b)
    if WRAP:
        distance = tl.minimum(distance, SIZE - distance)
    return distance


@triton.jit
def _squares(x_ptr, stride, patch, mask, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Squared norms of some patches."""
    square = tl.zeros((mask.shape[0],), tl.float32)
    for start in range(0, CHANNELS, BLOCK_D):
        x = _load(x_ptr, stride, patch, mask, start + tl.arange(0, BLOCK_D), CHANNELS).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    return square


@triton.jit
def _best(best, block, slot, K: tl.constexpr, NONE: tl.constexpr):
    """The best K of those so far and of a block: their ranks, cosines and numbers; at equal ranks the lower number."""
    best_rank, best_cosine, best_index = best
    rank, cosine, candidate = block
    new_rank, new_cosine, new_index = best_rank, best_cosine, best_index
    for s in range(K):
        top = tl.maximum(tl.max(best_rank, axis=1), tl.max(rank, axis=1))
        kept = tl.min(tl.where(best_rank == top[:, None], best_index, NONE), axis=1)
        fresh = tl.min(tl.where(rank == top[:, None], candidate, NONE), axis=1)
        chosen = tl.minimum(kept, fresh)
        was_kept = best_index == chosen[:, None]
        is_fresh = candidate == chosen[:, None]
        value = tl.sum(tl.where(was_kept, best_cosine, 0.0), axis=1)
        value += tl.sum(tl.where(is_fresh, cosine, 0.0), axis=1)
        here = (slot == s)[None, :]
        new_rank = tl.where(here, top[:, None], new_rank)
        new_cosine = tl.where(here, value[:, None], new_cosine)
        new_index = tl.where(here, chosen[:, None], new_index)
        best_rank = tl.where(was_kept, -float("inf"), best_rank)
        best_index = tl.where(was_kept, NONE, best_index)
        rank = tl.where(is_fresh, -float("inf"), rank)
        candidate = tl.where(is_fresh, NONE, candidate)
    return new_rank, new_cosine, new_index


@triton.jit
def _gram_kernel(
    x_ptr,  # [images, HEIGHT * WIDTH, CHANNELS]
    index_ptr,  # [images, HEIGHT * WIDTH, K] int32
    score_ptr,  # [images, HEIGHT * WIDTH, K] fp32, if HAS_SCORE
    stride_image,
    stride_patch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    KEEP: tl.constexpr,  # K rounded up to a power of two
    RADIUS: tl.constexpr,  # negative: all patches
    WRAP: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M patches against all candidates, BLOCK_N at a time; the K best so far stay in registers."""
    PATCHES: tl.constexpr = HEIGHT * WIDTH
    NONE: tl.constexpr = 2 * PATCHES + 2 * BLOCK_N  # above every candidate number
    image, offs_m = _block(PATCHES, BLOCK_M)
    mask_m = offs_m < PATCHES
    x_ptr += image * stride_image
    slot = tl.arange(0, KEEP)

    own_square = _squares(x_ptr, stride_patch, offs_m, mask_m, CHANNELS, BLOCK_D)
    best_rank = tl.full((BLOCK_M, KEEP), -float("inf"), tl.float32)
    best_cosine = tl.full((BLOCK_M, KEEP), -float("inf"), tl.float32)
    best_index = tl.zeros((BLOCK_M, KEEP), tl.int32) + (NONE - KEEP + slot)[None, :]
    for first in range(0, PATCHES, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < PATCHES
        dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        square = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, CHANNELS, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            own = _load(x_ptr, stride_patch, offs_m, mask_m, offs_d, CHANNELS)
            other = _load(x_ptr, stride_patch, offs_n, mask_n, offs_d, CHANNELS)
            wide = other.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
            dots = dot(own, tl.trans(other), dots)
        near = mask_n[None, :] & (offs_n[None, :] != offs_m[:, None])
        if RADIUS >= 0:
            near = near & (_apart(offs_n[None, :] // WIDTH, offs_m[:, None] // WIDTH, HEIGHT, WRAP) <= RADIUS)
            near = near & (_apart(offs_n[None, :] % WIDTH, offs_m[:, None] % WIDTH, WIDTH, WRAP) <= RADIUS)
        cosine = tl.where(near, _cosine(dots, own_square[:, None], square[None, :]), -float("inf"))
        rank = _rank(cosine, near)
        candidate = tl.where(near, offs_n[None, :], PATCHES + offs_n[None, :])
        best = best_rank, best_cosine, best_index
        best_rank, best_cosine, best_index = _best(best, (rank, cosine, candidate), slot, K, NONE)

    out = ((image * PATCHES + offs_m) * K)[:, None] + slot[None, :]
    mask_out = mask_m[:, None] & (slot < K)[None, :]
    found = best_index < PATCHES
    tl.store(index_ptr + out, tl.where(found, best_index, -1), mask=mask_out)
    if HAS_SCORE:
        tl.store(score_ptr + out, tl.where(found, best_cosine, -float("inf")), mask=mask_out)


_GRAM_KEY = ["HEIGHT", "WIDTH", "CHANNELS", "RADIUS", "K"]
_gram = autotune(GRAM_CONFIGS, key=_GRAM_KEY)(_gram_kernel)
_float32_gram = autotune(FLOAT32_GRAM_CONFIGS, key=_GRAM_KEY)(_gram_kernel)


def neighbor_topk_fwd(
    x: Tensor, height: int, width: int, k: int, radius: int, wrap: bool, scores: bool
) -> tuple[Tensor, Tensor]:
    """Raw arguments as `patchlight::neighbor_topk_fwd`."""
    x = with_near_rows(x)
    images, patches, channels = x.shape
    index = x.new_empty((images, patches, k), dtype=torch.int32)
    score = x.new_empty((images, patches, k) if scores else 0, dtype=torch.float32)
    operands = (x, index, score, x.stride(0), x.stride(1), height, width, channels, k)
    side = 2 * radius + 1
    if 1 <= radius <= 2 and capacity(height, width, radius) == side * side - 1:
        places = triton.next_power_of_2(side * side - 1)
        _window_kernel[lambda sizes: (images * triton.cdiv(patches, sizes["BLOCK_N"]),)](
            *operands, RADIUS=radius, PLACES=places, WRAP=wrap, HAS_SCORE=scores
        )
    else:
        keep = max(2, triton.next_power_of_2(k))
        kernel = _float32_gram if x.dtype == torch.float32 else _gram
        kernel[lambda sizes: (images * triton.cdiv(patches, sizes["BLOCK_M"]),)](
            *operands, KEEP=keep, RADIUS=radius, WRAP=wrap, HAS_SCORE=scores
        )
    return index, score
