"""One DINO + SelfPatch training step with the official mathematics, written from its description, on our own modules'
parameters: attention maps in memory, neighbors gathered and projected again for every position, logits of every row and
a log-softmax per pair of crops, per-tensor clipping that asks the device, an EMA parameter by parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlight.engine.branches import Student, Teacher
from patchlight.engine.optim import has_decay
from patchlight.records import Views
from patchlight_kernels.ops.neighbor_topk.reference import neighborhood

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, CENTER_MOMENTUM, LAMBDA, CLIP = 0.1, 0.04, 0.9, 0.1, 3.0


class OfficialStep:
    """Holds what the released trainer holds; `step(views)` is one iteration and returns its loss."""

    def __init__(self, student: Student, teacher: Teacher, k: int, lr: float, momentum: float) -> None:
        self.student, self.teacher, self.k, self.momentum = student, teacher, k, momentum
        decayed, plain = [], []
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                (decayed if has_decay(name, parameter) else plain).append(parameter)
        groups = [{"params": decayed, "weight_decay": 0.04}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, foreach=True)
        self.center = torch.zeros(1, student.heads["dino"].prototypes.count)
        self.patch_center = torch.zeros(1, student.heads["selfpatch"].prototypes.count)

    def step(self, views: Views) -> float:
        crops = [*views.global_crops.pixels, *views.local_crops.pixels]
        with torch.no_grad():
            teacher_cls, teacher_patches = self.look(self.teacher, crops, neighbors=True)
        student_cls, student_patches = self.look(self.student, crops, neighbors=False)
        loss = self.loss(student_cls, student_patches, teacher_cls, teacher_patches)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = CLIP / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:  # a wait for the device, per tensor
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(self.momentum).add_((1 - self.momentum) * theirs)
        return loss.item()

    def look(self, branch: nn.Module, crops: list[Tensor], neighbors: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of the summary and of the patches per crop, one pass per resolution."""
        sizes = [crop.shape[-1] for crop in crops]
        cls, patches = [], []
        for size in dict.fromkeys(sizes):
            same = torch.cat([crop for crop in crops if crop.shape[-1] == size])
            x, grid = backbone(branch.backbone, same)
            tokens = aggregate(branch.summary, x, grid, self.k if neighbors else None)
            count = sizes.count(size)
            cls += logits(branch.heads["dino"], tokens[:, 0]).chunk(count)
            patches += logits(branch.heads["selfpatch"], tokens[:, 1:]).chunk(count)
        return cls, patches

    def loss(self, student_cls, student_patches, teacher_cls, teacher_patches) -> Tensor:
        targets = [((t - self.center) / TEACHER_TEMPERATURE).softmax(-1).detach() for t in teacher_cls]
        total, pairs = 0.0, 0
        for i, target in enumerate(targets[:2]):
            for v, output in enumerate(student_cls):
                if v != i:
                    total = total + (-target * (output / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()
                    pairs += 1
        patch_total = 0.0
        for target, output in zip(teacher_patches, student_patches, strict=True):
            taught = ((target - self.patch_center) / TEACHER_TEMPERATURE).softmax(-1).detach()
            patch_total = patch_total + (-taught * (output / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1).mean()
        with torch.no_grad():
            rows = torch.cat([t.flatten(0, -2) for t in teacher_patches])
            self.center = CENTER_MOMENTUM * self.center + (1 - CENTER_MOMENTUM) * torch.cat(teacher_cls).mean(0, True)
            self.patch_center = CENTER_MOMENTUM * self.patch_center + (1 - CENTER_MOMENTUM) * rows.mean(0, True)
        return total / pairs + LAMBDA * patch_total / len(student_patches)


def backbone(vit: nn.Module, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The transformer with attention maps in memory."""
    x = vit.embed(pixels)
    for block in vit.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).unflatten(-1, (3, vit.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return x, vit.grid(*pixels.shape[-2:])


def aggregate(summary: nn.Module, x: Tensor, grid: tuple[int, int], k: int | None) -> Tensor:
    """[M, 1 + N, D]: the summary of all patches, then the patches, or (teacher) what each one's neighbors say."""
    images, patches, width = x.shape
    cls = class_attention_blocks(summary, summary.cls_token.expand(images, -1, -1), x)
    others = x
    if k is not None:
        table = neighborhood(*grid, 1, True)
        unit = F.normalize(x, dim=-1)
        similarity = (unit[:, table] @ unit.unsqueeze(-1)).squeeze(-1)  # [M, N, 8]
        slot = similarity.topk(k, dim=-1).indices
        near = x[:, table].gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, width))  # [M, N, k, D]
        token = summary.cls_token.expand(images * patches, -1, -1)
        others = class_attention_blocks(summary, token, near.flatten(0, 1)).view(images, patches, width)
    return summary.norm(torch.cat([cls, others], dim=1))


def class_attention_blocks(summary: nn.Module, state: Tensor, x: Tensor) -> Tensor:
    """The state [S, 1, D] reads its own sequence x [S, L, D]: keys and values are projected for each sequence."""
    for block in summary.blocks:
        u = block.norm1(torch.cat([state, x], dim=1))
        q = block.q(u[:, :1]).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        k = block.k(u).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        v = block.v(u).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        state = state + block.proj((weights @ v).transpose(1, 2).flatten(2))
        state = state + block.mlp(block.norm2(state))
    return state


def logits(head: nn.Module, x: Tensor) -> Tensor:
    """Logits of every row, in memory; the weight norm is computed in every call."""
    return head.prototypes.logits(head(x))
