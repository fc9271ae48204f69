"""Prototypes: the weight-normalized last layer, and the cross-entropy over it without the logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlight_kernels import prototype_ce

from ..checks import check, sentence
from ..records import SoftTarget


class Prototypes(nn.Module):
    """K learned directions; a row's logits are its products with them. The loss is here too, as it needs all of them.

    train_norm=False freezes every length at 1, so logits of normalized rows are cosines (norm_last_layer=True in the
    released code). True trains the lengths.
    """

    def __init__(self, width: int, count: int, train_norm: bool = False) -> None:
        super().__init__()
        rule = "Prototypes: width and count must be positive"
        check(min(width, count) >= 1, rule, f"{width} and {count}", "pass for example 256 and 65536")
        self.width, self.count = width, count
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))

    def directions(self) -> Tensor:
        """The effective weight [K, D]: weight_v * (weight_g / ||weight_v||), with half the memory traffic of (g * v) / ||v||."""
        v = _exact(self.weight_v)
        return v * (_exact(self.weight_g) / v.norm(dim=1, keepdim=True))

    def logits(self, z: Tensor) -> Tensor:
        """[..., D] to [..., K], in fp32 also under autocast: a cosine stored in bf16 is off by 0.002, and / 0.04 that is 5 %."""
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
        row_weight defaults to 1/R. Gradients reach z and these prototypes, never the target. In fp32, also under autocast; on
        a GPU fp32 values are rounded to fp16 for products only. A teacher's temperature on the device is read there.
        """
        _check_shapes(self, z_SRD, target, pair_weight_TS, row_weight_R)
        z = _exact(z_SRD)
        if isinstance(temperature, Tensor):  # the host never reads it: its operand is divided by it, and the op gets 1
            z, temperature = z / temperature, 1.0
        operands = self.directions(), target.z, target.prototypes, pair_weight_TS
        weight, teacher_z, teacher_weight, pair_weight = (x.to(z.dtype) for x in operands)
        row_weight, bias = (None if x is None else x.to(z.dtype) for x in (row_weight_R, target.bias))
        # fp32 in and fp32 gradients out; on a GPU the op multiplies in fp16 inside, with as many digits as tf32.
        return prototype_ce(
            z, weight, teacher_z, teacher_weight, temperature, target.temperature, pair_weight, row_weight, bias
        )

    def extra_repr(self) -> str:
        return f"width={self.width}, count={self.count}, train_norm={self.weight_g.requires_grad}"


def _exact(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_shapes(
    prototypes: Prototypes, z: Tensor, target: SoftTarget, pair_weight: Tensor, row_weight: Tensor | None
) -> None:
    if z.ndim != 3 or z.shape[2] != prototypes.width:
        rule = f"Prototypes: z must be [student views, rows, {prototypes.width}]"
        raise ValueError(sentence(rule, tuple(z.shape), "stack the views and flatten images and patches into rows"))
    if target.z.ndim != 3 or target.z.shape[1] != z.shape[1]:
        rule = f"Prototypes: target.z must be [teacher views, {z.shape[1]} rows, width] like z"
        raise ValueError(sentence(rule, tuple(target.z.shape), "row r of both is the same image or patch"))
    if target.prototypes.shape[0] != prototypes.count:
        rule = f"Prototypes: the target must have as many prototypes as the student, {prototypes.count}"
        raise ValueError(sentence(rule, target.prototypes.shape[0], "give both branches the same head"))
    if pair_weight.shape != (len(target.z), len(z)):
        rule = f"Prototypes: pair_weight must be [teacher views, student views] = {(len(target.z), len(z))}"
        raise ValueError(sentence(rule, tuple(pair_weight.shape), "use 0 for a pair that does not count"))
    if row_weight is not None and row_weight.shape != z.shape[1:2]:
        rule = f"Prototypes: row_weight must have a weight per row, {z.shape[1]}"
        raise ValueError(sentence(rule, tuple(row_weight.shape), "leave it out for the mean over rows"))
