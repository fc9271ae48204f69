"""SERE's heads: features pass through them before their relations in space and between channels are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import sentence


@dataclass(frozen=True, slots=True)
class RelationFeatures:
    """Features whose relations to each other are compared."""

    spatial: Tensor  # [V, B, N, D] to relate patches
    channel: Tensor  # [V, B, N, D] to relate channels


@dataclass(frozen=True, slots=True)
class StudentRelations:
    """The student's features, by kind of crop."""

    global_crops: RelationFeatures
    local_crops: RelationFeatures | None


# So that FSDP2 finds the tensors in a module's input and output.
torch.export.register_dataclass(RelationFeatures)
torch.export.register_dataclass(StudentRelations)


class RelationHead(nn.Module):
    """The projection, ReLU(BN(x)), in both branches. The statistics are of the batch, over all its patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial, self.channel = _projection(width), _projection(width)

    def forward(self, patches: Tensor) -> RelationFeatures:
        patches = patches.contiguous()  # else each projection would copy the view without the class token
        return RelationFeatures(_by_row(self.spatial, patches), _by_row(self.channel, patches))


class RelationPrediction(nn.Module):
    """The prediction ReLU(BN(W h)) of projected features, which makes the loss asymmetric."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial, self.channel = _prediction(width), _prediction(width)

    def forward(self, projected: RelationFeatures) -> RelationFeatures:
        spatial, channel = _by_row(self.spatial, projected.spatial), _by_row(self.channel, projected.channel)
        return RelationFeatures(spatial, channel)


class RelationPredictor(nn.Module):
    """The student's own modules: predictions, and a separate projection for local crops, if there are any.

    asymmetric=False leaves the predictions out, so that student and teacher differ in nothing but their weights.
    """

    def __init__(self, width: int, asymmetric: bool, local: bool) -> None:
        super().__init__()
        self.prediction = RelationPrediction(width) if asymmetric else nn.Identity()
        self.local_head = RelationHead(width) if local else None
        self.local_prediction = RelationPrediction(width) if local and asymmetric else nn.Identity()

    def forward(self, projected: RelationFeatures, local_patches: Tensor | None) -> StudentRelations:
        """Global crops after the student's head; local crops straight from the backbone."""
        if local_patches is None:
            return StudentRelations(self.prediction(projected), None)
        if self.local_head is None:
            rule = "RelationPredictor: local crops need a projection of their own"
            raise ValueError(sentence(rule, "none", "build it with local=True"))
        local = self.local_prediction(self.local_head(local_patches))
        return StudentRelations(self.prediction(projected), local)


def _projection(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.ReLU())


def _prediction(width: int) -> nn.Module:
    """The linear layer keeps PyTorch's initialization, as released."""
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())


def _by_row(module: nn.Module, x: Tensor) -> Tensor:
    """All patches of all crops as one batch of rows, for BatchNorm."""
    return module(x.reshape(-1, x.shape[-1])).reshape(x.shape)
