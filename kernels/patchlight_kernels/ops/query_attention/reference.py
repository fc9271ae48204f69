"""The specification of query_attention in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...arguments import accumulator


@dataclass(frozen=True, slots=True)
class Segment:
    """Adjacent tokens that read the same keys: the raw tokens, and those of their own segment if `own`."""

    first: int
    count: int
    own: bool

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


def segments(tokens: int, raw: int, crop: int) -> Iterator[Segment]:
    """The raw tokens, which read the raw ones only, then the queries: crop by crop, or all at once if crop is 0."""
    yield Segment(0, raw, own=False)
    count = crop or tokens - raw
    for first in range(raw, tokens, max(count, 1)):
        yield Segment(first, count, own=crop > 0)


def scale_of(width: int) -> float:
    """What scores are multiplied by."""
    return max(width, 1) ** -0.5


def query_attention_fwd(qkv: Tensor, raw: int, crop: int) -> tuple[Tensor, Tensor]:
    """Takes the arguments of `patchlight::query_attention_fwd`: the output [M, T, H, E] and its log-sum-exp [M, H, T]."""
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = _heads(qkv)
        outputs, sums = [], []
        for segment in segments(qkv.shape[1], raw, crop):
            scores = q[:, :, segment.rows] @ _read(k, raw, segment).mT * scale_of(qkv.shape[-1])
            lse = scores.logsumexp(dim=-1)
            weights = _rounded((scores - lse[..., None]).exp(), qkv.dtype)
            outputs.append(weights @ _read(v, raw, segment))
            sums.append(lse)
        out = torch.cat(outputs, dim=2).transpose(1, 2).to(qkv.dtype)
        return out.contiguous(), torch.cat(sums, dim=2)


def query_attention_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, raw: int, crop: int) -> Tensor:
    """The gradient of qkv, packed like it. `out` is for implementations that compute sum(P dP) as sum(g out).

    With probabilities P, outputs P v and upstream g: dP = g v^T, dS = P (dP - sum(P dP)) E^-0.5, and then
    dq = dS k, dk = dS^T q, dv = P^T g, the last two summed over the segments that read the row.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = _heads(qkv)
        g = grad.to(q.dtype).transpose(1, 2)
        dqkv = q.new_zeros(qkv.shape)
        dq, dk, dv = _heads(dqkv)
        for segment in segments(qkv.shape[1], raw, crop):
            rows, scale = segment.rows, scale_of(qkv.shape[-1])
            keys, values = _read(k, raw, segment), _read(v, raw, segment)
            weights = (q[:, :, rows] @ keys.mT * scale - lse[:, :, rows, None]).exp()
            d_weights = g[:, :, rows] @ values.mT
            d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) * scale
            weights, d_scores = _rounded(weights, qkv.dtype), _rounded(d_scores, qkv.dtype)
            dq[:, :, rows] = d_scores @ keys
            for gradient, coefficients, x in ((dk, d_scores, q), (dv, weights, g)):
                of_keys = coefficients.mT @ x[:, :, rows]
                gradient[:, :, :raw] += of_keys[:, :, :raw]
                if segment.own:
                    gradient[:, :, rows] += of_keys[:, :, raw:]
        return dqkv.to(qkv.dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the inputs' dtype, as PyTorch's own attention does before a product, with and without autocast."""
    return x.to(dtype).to(x.dtype)


def _heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [M, H, T, E] of a packed [M, T, 3, H, E], in the accumulator's dtype."""
    return qkv.to(accumulator(qkv.dtype)).permute(2, 0, 3, 1, 4).unbind(0)


def _read(x: Tensor, raw: int, segment: Segment) -> Tensor:
    """The rows of keys or values [M, H, T, E] that a segment reads."""
    shared = x[:, :, :raw]
    return torch.cat([shared, x[:, :, segment.rows]], dim=2) if segment.own else shared
