"""Prototypes: the weight-normalised last layer, and the cross-entropy over it that never needs a pair loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..records import SoftTarget

CHUNK_LOGITS = 1 << 26  # logits held at once, 256 MiB in fp32; DINO's [CLS] rows fit, dense patch rows go in chunks


class Prototypes(nn.Module):
    """K learned directions; a row's logits are its products with them. Also the loss over them, as it needs them whole.

    train_norm=False freezes every length at 1, so logits of normalised rows are cosines (norm_last_layer=True in the
    released code). True trains the lengths.
    """

    def __init__(self, width: int, count: int, train_norm: bool = False) -> None:
        super().__init__()
        if min(width, count) < 1:
            raise ValueError(
                f"Prototypes: width and count must be positive, got {width} and {count}; pass e.g. 256 and 65536."
            )
        self.width, self.count = width, count
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def directions(self) -> Tensor:
        """The effective weight [K, D]: weight_g * weight_v / ||weight_v||."""
        v = _exact(self.weight_v)
        return _exact(self.weight_g) * v / v.norm(dim=1, keepdim=True)

    def logits(self, z: Tensor) -> Tensor:
        """[..., D] to [..., K], in fp32 also under autocast: a bf16 cosine is off by 0.002, and / 0.04 that is 5 %."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(_exact(z), self.directions())

    def forward(
        self,
        z_SRD: Tensor,
        target: SoftTarget,
        temperature: float | Tensor,
        pair_weight_TS: Tensor,
        row_weight_R: Tensor | None = None,
    ) -> Tensor:
        """The scalar sum over teacher views t, student views s and rows r of pair_weight[t, s] * row_weight[r] * CE.

        CE is the cross-entropy of softmax(z W^T / temperature) against the target's distribution of view t, row r;
        row_weight defaults to 1/R. Gradients reach z and these prototypes, never the target.
        """
        _check_shapes(self, z_SRD, target, pair_weight_TS, row_weight_R)
        if row_weight_R is None:
            rows = z_SRD.shape[1]
            row_weight_R = z_SRD.new_full((rows,), 1 / max(rows, 1), dtype=_exact_dtype(z_SRD))
        with torch.autocast(z_SRD.device.type, enabled=False):
            return prototype_cross_entropy_reference(
                z_SRD, self.directions(), target, temperature, pair_weight_TS, row_weight_R
            )

    def extra_repr(self) -> str:
        return f"width={self.width}, count={self.count}, train_norm={self.weight_g.requires_grad}"


def prototype_cross_entropy_reference(
    z_SRD: Tensor,
    prototypes_KD: Tensor,
    target: SoftTarget,
    temperature: float | Tensor,
    pair_weight_TS: Tensor,
    row_weight_R: Tensor,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """The loss of `Prototypes.forward` in at least fp32, with at most about chunk_logits logits in memory at a time.

    Rows beyond that are computed in chunks whose logits the backward computes again.
    """
    z, w = _exact(z_SRD), _exact(prototypes_KD)
    teacher_z, teacher_w = _exact(target.z.detach()), _exact(target.prototypes.detach())
    bias = None if target.bias is None else _exact(target.bias.detach())
    pair_weight, row_weight = pair_weight_TS.to(z.dtype), row_weight_R.to(z.dtype)

    def loss_of(z: Tensor, w: Tensor, teacher_z: Tensor, row_weight: Tensor) -> Tensor:
        p_TRK = (F.linear(teacher_z, teacher_w, bias) / target.temperature).softmax(dim=-1)
        # Cross-entropy is linear in the target: -sum_k p_k log softmax(l)_k = logsumexp(l) - z . (p W) / temperature.
        # So a teacher row costs one vector in prototype space, however many student views it is paired with.
        pull_SRD = torch.einsum("ts,trd->srd", pair_weight, p_TRK @ w)
        log_partition_SR = (F.linear(z, w) / temperature).logsumexp(dim=-1)
        loss_SR = pair_weight.sum(dim=0)[:, None] * log_partition_SR - (z * pull_SRD).sum(dim=-1) / temperature
        return (loss_SR * row_weight).sum()

    rows = z.shape[1]
    chunk = max(1, chunk_logits // ((len(z) + len(teacher_z)) * len(w)))
    if rows <= chunk:
        return loss_of(z, w, teacher_z, row_weight)
    pieces = zip(z.split(chunk, 1), teacher_z.split(chunk, 1), row_weight.split(chunk), strict=True)
    losses = [
        checkpoint(loss_of, z_part, w, teacher_part, weight_part, use_reentrant=False, preserve_rng_state=False)
        for z_part, teacher_part, weight_part in pieces
    ]
    return torch.stack(losses).sum()


def _exact_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _exact(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is already."""
    return x.to(_exact_dtype(x))


def _check_shapes(
    prototypes: Prototypes, z: Tensor, target: SoftTarget, pair_weight: Tensor, row_weight: Tensor | None
) -> None:
    if z.ndim != 3 or z.shape[2] != prototypes.width:
        raise ValueError(
            f"Prototypes: z must be [student views, rows, {prototypes.width}], got {tuple(z.shape)}; "
            "stack the views and flatten images and patches into rows."
        )
    if target.z.ndim != 3 or target.z.shape[1] != z.shape[1]:
        raise ValueError(
            f"Prototypes: target.z must be [teacher views, {z.shape[1]} rows, width] like z, "
            f"got {tuple(target.z.shape)}; row r of both is the same image or patch."
        )
    if target.prototypes.shape[0] != prototypes.count:
        raise ValueError(
            f"Prototypes: the target must have as many prototypes as the student, {prototypes.count}, "
            f"got {target.prototypes.shape[0]}; give both branches the same head."
        )
    if pair_weight.shape != (len(target.z), len(z)):
        raise ValueError(
            f"Prototypes: pair_weight must be [teacher views, student views] = {(len(target.z), len(z))}, "
            f"got {tuple(pair_weight.shape)}; use 0 for a pair that does not count."
        )
    if row_weight is not None and row_weight.shape != z.shape[1:2]:
        raise ValueError(
            f"Prototypes: row_weight must have one weight per row, {z.shape[1]}, got {tuple(row_weight.shape)}; "
            "leave it out for the mean over rows."
        )
