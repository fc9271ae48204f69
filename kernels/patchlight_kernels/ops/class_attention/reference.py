"""The specification of class_attention in plain PyTorch: any device, fp64 in fp64, everything else in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import accumulator


def state_shape(q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, index: Tensor | None) -> tuple[int, ...]:
    """[M, Q, H, E]: one row for every state, however many states share one of q, k_self, v_self."""
    states = max(x.shape[1] for x in (q, k_self, v_self)) if index is None else index.shape[1]
    return (k_patches.shape[0], states, *k_patches.shape[2:])


def scale_of(width: int) -> float:
    """What scores are multiplied by."""
    return max(width, 1) ** -0.5


def class_attention_fwd(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_patches: Tensor, v_patches: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Takes the arguments of `patchlight::class_attention_fwd`: the output [M, Q, H, E] and its log-sum-exp [M, Q, H]."""
    shape = state_shape(q, k_self, v_self, k_patches, index)
    with torch.autocast(q.device.type, enabled=False):
        wide_q, k_self, v_self = (_wide(x).expand(shape) for x in (q, k_self, v_self))
        scores = _dots(wide_q, k_self, _read(k_patches, index)) * scale_of(shape[-1])
        scores[..., 1:].masked_fill_(_missing(index, k_patches), -torch.inf)
        lse = scores.logsumexp(dim=-1)
        weights = (scores - lse[..., None]).exp()
        return _mix(weights, v_self, _read(v_patches, index)).to(q.dtype), lse


def class_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_patches: Tensor,
    v_patches: Tensor,
    index: Tensor | None,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors; those of q, k_self, v_self for every state, not yet summed over a size of 1.

    With weights P, outputs sum(P v) and upstream g: dP = g . v, dS = P (dP - sum(P dP)) E^-0.5, and then
    dq = sum(dS k), dk = dS q, dv = P g, the last two summed over the states that read the row.
    """
    shape = state_shape(q, k_self, v_self, k_patches, index)
    with torch.autocast(q.device.type, enabled=False):
        wide_q, wide_k_self, wide_v_self = (_wide(x).expand(shape) for x in (q, k_self, v_self))
        wide_grad, scale = _wide(grad), scale_of(shape[-1])
        k_read = _read(k_patches, index)
        scores = _dots(wide_q, wide_k_self, k_read) * scale
        scores[..., 1:].masked_fill_(_missing(index, k_patches), -torch.inf)
        weights = (scores - lse[..., None]).exp()
        d_weights = _dots(wide_grad, wide_v_self, _read(v_patches, index))
        d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) * scale
        own = (
            _mix(d_scores, wide_k_self, k_read),
            d_scores[..., :1] * wide_q,
            weights[..., :1] * wide_grad,
        )
        patches = (
            _gathered(d_scores[..., 1:], wide_q, index, k_patches),
            _gathered(weights[..., 1:], wide_grad, index, v_patches),
        )
        dq, dk_self, dv_self = (gradient_per_state(g, x) for g, x in zip(own, (q, k_self, v_self), strict=True))
        dk_patches, dv_patches = (gradient.to(q.dtype) for gradient in patches)
        return dq, dk_self, dv_self, dk_patches, dv_patches


def gradient_per_state(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient [M, Q, H, E] in x's dtype, or in the accumulator's if rows of it are still to be summed."""
    return gradient if gradient.shape != x.shape else gradient.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In the dtype that sums are kept in."""
    return x.to(accumulator(x.dtype))


def _missing(index: Tensor | None, patches: Tensor) -> Tensor:
    """Which slots hold no patch, for every head: [M, Q, 1, k], or one False."""
    if index is None:
        return torch.zeros((), dtype=torch.bool, device=patches.device)
    return ((index < 0) | (index >= patches.shape[1]))[:, :, None]


def _read(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows that states read: all, as [M, 1, N, H, E], or [M, Q, k, H, E] with zeros where there is no patch."""
    x = _wide(x)
    if index is None:
        return x[:, None]
    images, patches = x.shape[:2]
    with_zeros = torch.cat([x, x.new_zeros(images, 1, *x.shape[2:])], dim=1)
    slot = index.long().masked_fill(_missing(index, x)[:, :, 0], patches)
    return with_zeros[torch.arange(images, device=x.device)[:, None, None], slot]


def _dots(a: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """a [M, Q, H, E] times its own row and times the others [M, 1 or Q, K, H, E]: [M, Q, H, 1 + K]."""
    return torch.cat(
        [(a * own).sum(-1, keepdim=True), torch.einsum("mqhe,mqkhe->mqhk", a, _expanded(others, a))], dim=-1
    )


def _mix(weights: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Rows mixed by weights [M, Q, H, 1 + K]: [M, Q, H, E]."""
    return weights[..., :1] * own + torch.einsum("mqhk,mqkhe->mqhe", weights[..., 1:], _expanded(others, own))


def _expanded(others: Tensor, states: Tensor) -> Tensor:
    """The rows [M, 1 or Q, K, H, E] for every state: [M, Q, K, H, E]."""
    return others.expand(-1, states.shape[1], -1, -1, -1)


def _gathered(coefficients: Tensor, rows: Tensor, index: Tensor | None, patches: Tensor) -> Tensor:
    """For every patch the sum of rows [M, Q, H, E] of the states that read it, times their coefficients [M, Q, H, K]."""
    if index is not None:  # a matrix of which state reads which patch: a product is deterministic on every device
        reads = index[..., None] == torch.arange(patches.shape[1], device=index.device, dtype=index.dtype)
        coefficients = torch.einsum("mqhk,mqkn->mqhn", coefficients, reads.to(coefficients.dtype))
    return torch.einsum("mqhn,mqhe->mnhe", coefficients, rows)
