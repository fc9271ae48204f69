"""Prototypes: the weight-normalised last layer, and the cross-entropy over it that never holds the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlight_kernels import prototype_ce

from ..records import SoftTarget


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
        """The effective weight [K, D]: weight_v * (weight_g / ||weight_v||), half the passes of (g * v) / ||v||."""
        v = _exact(self.weight_v)
        return v * (_exact(self.weight_g) / v.norm(dim=1, keepdim=True))

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
        row_weight defaults to 1/R. Gradients reach z and these prototypes, never the target. In fp32, also under autocast.
        """
        _check_shapes(self, z_SRD, target, pair_weight_TS, row_weight_R)
        z = _exact(z_SRD)
        teacher_z, bias, teacher_temperature = target.z, target.bias, target.temperature
        # A temperature on the device is read by no host: what is divided by it has the temperature 1.
        if isinstance(temperature, Tensor):
            z, temperature = z / temperature, 1.0
        if isinstance(teacher_temperature, Tensor):
            teacher_z = _exact(teacher_z) / teacher_temperature
            bias = None if bias is None else bias / teacher_temperature
            teacher_temperature = 1.0
        others = (self.directions(), teacher_z, target.prototypes, pair_weight_TS, row_weight_R, bias)
        w, teacher_z, teacher_w, pairs, rows, bias = (None if x is None else x.to(z.dtype) for x in others)
        return prototype_ce(z, w, teacher_z, teacher_w, temperature, teacher_temperature, pairs, rows, bias)

    def extra_repr(self) -> str:
        return f"width={self.width}, count={self.count}, train_norm={self.weight_g.requires_grad}"


def _exact(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
