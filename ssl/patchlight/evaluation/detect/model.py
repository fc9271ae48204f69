"""A detector: an encoder's maps, a feature pyramid, proposals of places, and stages that judge them."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..encoder import Encoder, autocast
from ..pyramid import STRIDES, Pyramid
from .protocols import DetectProtocol
from .stages import Stages
from .training_images import Target

_RATIOS = (0.5, 1.0, 2.0)  # of the sides of anchors
_TESTED = 1000  # proposals per map, and of all maps, in testing; in training twice as many per map
_COARSEST = 64  # stride of the pyramid's last map, a pooled one


class Detector(nn.Module):
    """Mask R-CNN or Cascade Mask R-CNN over an encoder, for a number of classes."""

    def __init__(self, encoder: Encoder, protocol: DetectProtocol, classes: int) -> None:
        super().__init__()
        self.encoder, self.pyramid = encoder, Pyramid(encoder.map_levels)
        self.fpn = FeaturePyramidNetwork(list(self.pyramid.channels), protocol.channels, LastLevelMaxPool())
        strides, wanted = (*STRIDES, _COARSEST), protocol.proposals
        anchors = AnchorGenerator(tuple((protocol.anchor * s,) for s in strides), (_RATIOS,) * len(strides))
        self.proposals = RegionProposalNetwork(
            anchors, RPNHead(protocol.channels, len(_RATIOS)), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
            batch_size_per_image=256, positive_fraction=0.5,
            pre_nms_top_n={"training": min(2 * wanted, 2 * _TESTED), "testing": min(2 * wanted, _TESTED)},
            post_nms_top_n={"training": wanted, "testing": min(wanted, _TESTED)},
            nms_thresh=0.7,
        )  # fmt: skip
        self.stages = Stages(protocol, classes)

    def others(self) -> nn.ModuleList:
        """The modules outside the backbone."""
        return nn.ModuleList([self.encoder.summary, self.pyramid, self.fpn, self.proposals, self.stages])

    def losses(self, images: list[Tensor], targets: list[Target], precision: str) -> dict[str, Tensor]:
        """The terms of the loss for images [3, H, W] uint8 of any sizes and what is in them."""
        batch, maps = self._maps(images, precision)
        boxes, losses = self.proposals(batch, maps, targets)
        return losses | self.stages.losses(list(maps.values())[:-1], boxes, targets, batch.image_sizes)

    def found(self, images: list[Tensor], precision: str) -> list[Target]:
        """Boxes, labels from 1, scores and masks [n, 1, 28, 28] in their boxes, for images [3, H, W] uint8 of any sizes."""
        batch, maps = self._maps(images, precision)
        boxes, _ = self.proposals(batch, maps)
        return self.stages.found(list(maps.values())[:-1], boxes, batch.image_sizes)

    def _maps(self, images: list[Tensor], precision: str) -> tuple[ImageList, dict[str, Tensor]]:
        """Images normalized in one batch, padded to whole patches and strides, and their five maps, in fp32."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        whole = math.lcm(STRIDES[-1], self.encoder.patch_size)
        height, width = (-(-max(sides) // whole) * whole for sides in zip(*sizes, strict=True))
        pixels = images[0].new_zeros(len(images), 3, height, width, dtype=torch.float32)
        for row, image in zip(pixels, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]] = self.encoder.normalize(image)
        with autocast(pixels.device, precision):
            maps = self.pyramid(self.encoder.maps(pixels))
            named = self.fpn(OrderedDict((str(number), x) for number, x in enumerate(maps)))
        return ImageList(pixels, sizes), {name: x.float() for name, x in named.items()}
