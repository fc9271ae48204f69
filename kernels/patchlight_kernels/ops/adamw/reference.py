"""The specification of adamw in plain PyTorch. Nothing is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_fwd(
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    teachers: list[Tensor],
    copies: list[Tensor],
    teacher_copies: list[Tensor],
    steps: Tensor,
    scale: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    freeze: Tensor,
    refused: Tensor,
    decayed: list[bool],
    frozen: list[bool],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Changes all lists but the gradients, and the steps."""
    keep = refused > 0
    for number, p in enumerate(parameters):
        gradient, step = gradients[number], steps[number]
        if gradient is not None:
            stay = keep | (freeze > 0) if frozen[number] else keep
            g = gradient.to(p.dtype) * scale[number]
            m = exp_avgs[number].lerp(g, 1 - beta1)
            v = exp_avg_sqs[number] * beta2 + (1 - beta2) * g.square()
            count = step.double() + 1
            rate, root = lr / (1 - beta1**count), (1 - beta2**count).rsqrt()
            base = p * (1 - lr * weight_decay) if decayed[number] else p
            _replace(p, base - rate * (m / (v.sqrt() * root + eps)), stay)
            _replace(exp_avgs[number], m, stay)
            _replace(exp_avg_sqs[number], v, stay)
            _replace(step, count.to(step.dtype), stay)
        _replace_optional(copies, number, p, keep)
        if teachers and teachers[number].numel():
            teacher = teachers[number]
            _replace(teacher, teacher.lerp(p, (1 - momentum).to(p.dtype)), keep)
            _replace_optional(teacher_copies, number, teacher, keep)


def _replace(old: Tensor, new: Tensor, stay: Tensor) -> None:
    """Writes the new values, unless they shall stay."""
    old.copy_(torch.where(stay, old, new))


def _replace_optional(tensors: list[Tensor], number: int, new: Tensor, stay: Tensor) -> None:
    if tensors and tensors[number].numel():
        _replace(tensors[number], new.to(tensors[number].dtype), stay)
