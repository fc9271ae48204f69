"""SERE's heads: what features pass through before they are related to each other, one for space and one for channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RelationFeatures:
    """Features whose relations among themselves are compared."""

    spatial: Tensor  # [V, B, N, D] to relate patches
    channel: Tensor  # [V, B, N, D] to relate channels


@dataclass(frozen=True, slots=True)
class StudentRelations:
    """What the student shows of its crops."""

    global_crops: RelationFeatures
    local_crops: RelationFeatures | None


# So that FSDP2 finds the tensors in a module's input and output.
torch.export.register_dataclass(RelationFeatures)
torch.export.register_dataclass(StudentRelations)


class RelationHead(nn.Module):
    """The projection, ReLU(BN(x)), in both branches. The statistics are those of the batch, over all its patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial, self.channel = _projection(width), _projection(width)

    def forward(self, patches: Tensor) -> RelationFeatures:
        patches = patches.contiguous()  # a view without the class token would be copied for each
        return RelationFeatures(_by_row(self.spatial, patches), _by_row(self.channel, patches))


class RelationPrediction(nn.Module):
    """The prediction ReLU(BN(W h)) of projected features: what makes the loss asymmetric."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial, self.channel = _prediction(width), _prediction(width)

    def forward(self, projected: RelationFeatures) -> RelationFeatures:
        spatial, channel = _by_row(self.spatial, projected.spatial), _by_row(self.channel, projected.channel)
        return RelationFeatures(spatial, channel)


class RelationPredictor(nn.Module):
    """What only the student has: predictions, and a projection of their own for local crops, if there are any.

    asymmetric=False leaves the predictions out, so that student and teacher differ in nothing but their weights.
    """

    def __init__(self, width: int, asymmetric: bool, local: bool) -> None:
        super().__init__()
        self.prediction = RelationPrediction(width) if asymmetric else nn.Identity()
        self.local_head = RelationHead(width) if local else None
        self.local_prediction = RelationPrediction(width) if local and asymmetric else nn.Identity()

    def forward(self, projected: RelationFeatures, local_patches: Tensor | None) -> StudentRelations:
        """Global crops as the student's head has projected them; local crops as the backbone left them."""
        local = None if local_patches is None else self.local_prediction(self.local_head(local_patches))
        return StudentRelations(self.prediction(projected), local)


def _projection(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.ReLU())


def _prediction(width: int) -> nn.Module:
    """The linear layer keeps the library's start, as released."""
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())


def _by_row(module: nn.Module, x: Tensor) -> Tensor:
    """All patches of all crops as one batch of rows, for BatchNorm."""
    return module(x.reshape(-1, x.shape[-1])).reshape(x.shape)
