"""The stages of a detector on proposals: classes, boxes and masks. Mask R-CNN has one, Cascade Mask R-CNN three."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, roi_align

from ..pyramid import STRIDES
from .protocols import DetectProtocol
from .training_images import Target

_BOX, _MASK = 7, 14  # sides of the features of a box for its class and place, and for its mask
_CODER_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of boxes, by stage
_LOSS_WEIGHTS = (1.0, 0.5, 0.25)  # by stage
_GIOU_WEIGHT = 10.0  # of the cascade's loss of boxes
_FINEST = 56  # boxes with sides below twice this take the first map, and each doubling the next one

Sizes = list[tuple[int, int]]


class RoiPool(nn.Module):
    """Features [n, C, side, side] of boxes, each from the map that fits its size, by RoIAlign as mmdetection has it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """maps: of strides 4, 8, 16, 32; boxes: [n, 4] of each image."""
        rows = torch.cat([torch.cat([b.new_full((len(b), 1), image), b], 1) for image, b in enumerate(boxes)])
        sides = ((rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])).clamp_min(0).sqrt()
        levels = (sides / _FINEST + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1).long()
        found = rows.new_zeros(len(rows), maps[0].shape[1], self.side, self.side)
        for level, (x, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            here = (levels == level).nonzero()[:, 0]
            if len(here):
                part = roi_align(x, rows[here], self.side, 1 / stride, sampling_ratio=0, aligned=True)
                found = found.index_copy(0, here, part)
        return found


class Stage(RoIHeads):
    """What is an object from an overlap on: its class, its box, its mask. torchvision samples, encodes and selects."""

    def __init__(self, number: int, protocol: DetectProtocol, classes: int) -> None:
        overlap, channels, hidden = protocol.overlaps[number], protocol.channels, protocol.hidden
        head: nn.Module = TwoMLPHead(channels * _BOX**2, hidden)
        if protocol.box_convs:
            sizes = (channels, _BOX, _BOX), [channels] * protocol.box_convs, [hidden]
            head = FastRCNNConvFCHead(*sizes, norm_layer=nn.BatchNorm2d)
        super().__init__(
            box_roi_pool=RoiPool(_BOX), box_head=head, box_predictor=FastRCNNPredictor(hidden, classes + 1),
            fg_iou_thresh=overlap, bg_iou_thresh=overlap, batch_size_per_image=protocol.samples,
            positive_fraction=0.25, bbox_reg_weights=_CODER_WEIGHTS[number], score_thresh=protocol.least_score,
            nms_thresh=0.5, detections_per_img=protocol.detections, mask_roi_pool=RoiPool(_MASK),
            mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, classes + 1),
        )  # fmt: skip
        self.giou = len(protocol.overlaps) > 1

    def score(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class scores [n, C + 1] and box changes [n, 4 (C + 1)]; class 0 is the background."""
        return self.box_predictor(self.box_head(self.box_roi_pool(maps, boxes)))

    def masks(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> Tensor:
        """Mask scores [n, C + 1, 28, 28]."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes)))

    def losses(
        self, maps: Sequence[Tensor], proposals: list[Tensor], targets: list[Target], sizes: Sizes
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The losses of a sample of the proposals and of the true boxes, and the sample's improved boxes."""
        boxes, matches, labels, goals = self.select_training_samples(list(proposals), targets)
        scores, changes = self.score(maps, boxes)
        label = torch.cat(labels)
        rows, goal, positive = torch.cat(boxes), torch.cat(goals), label > 0
        own = _of_class(changes, label)
        if self.giou:
            decode = self.box_coder.decode_single
            places = decode(own[positive], rows[positive]), decode(goal[positive], rows[positive])
            box_loss = _GIOU_WEIGHT * generalized_box_iou_loss(*places, reduction="sum")
        else:
            box_loss = F.l1_loss(own[positive], goal[positive], reduction="sum")
        inside = [b[l > 0] for b, l in zip(boxes, labels, strict=True)]
        true_masks = [_inside(t["masks"], b, m[l > 0], 2 * _MASK)
                      for t, b, m, l in zip(targets, inside, matches, labels, strict=True)]  # fmt: skip
        own_masks = _of_label(self.masks(maps, inside), label[positive])
        mask_loss = F.binary_cross_entropy_with_logits(own_masks, torch.cat(true_masks), reduction="sum")
        losses = {
            "class": F.cross_entropy(scores, label),
            "box": box_loss / len(label),
            "mask": mask_loss / max(1, own_masks.numel()),
        }
        with torch.no_grad():
            best = torch.where(positive, label, scores[:, 1:].argmax(1) + 1)
            better = self.improved(boxes, changes, best, sizes)
        true = [(b[:, None] == t["boxes"]).all(2).any(1) for b, t in zip(boxes, targets, strict=True)]
        return losses, [b[~same] for b, same in zip(better, true, strict=True)]  # the true boxes come anew

    def improved(self, boxes: list[Tensor], changes: Tensor, labels: Tensor, sizes: Sizes) -> list[Tensor]:
        """Boxes after the changes for their classes, inside their images."""
        places = self.box_coder.decode_single(_of_class(changes, labels), torch.cat(boxes))
        parts = places.split([len(b) for b in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


class Stages(nn.Module):
    """All stages, one after the other: each improves the boxes of the one before."""

    def __init__(self, protocol: DetectProtocol, classes: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Stage(number, protocol, classes) for number in range(len(protocol.overlaps)))

    @property
    def stages(self) -> list[Stage]:
        return [part for part in self.parts if isinstance(part, Stage)]

    def losses(
        self, maps: Sequence[Tensor], proposals: list[Tensor], targets: list[Target], sizes: Sizes
    ) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for stage, weight in zip(self.stages, _LOSS_WEIGHTS, strict=False):
            losses, proposals = stage.losses(maps, proposals, targets, sizes)
            total = {name: total.get(name, 0) + weight * loss for name, loss in losses.items()}
        return total

    def found(self, maps: Sequence[Tensor], boxes: list[Tensor], sizes: Sizes) -> list[Target]:
        """Boxes, labels from 1, scores and masks [n, 1, 28, 28] of each image; scores and masks are means over stages."""
        scores, last = [], self.stages[-1]
        for stage in self.stages:
            score, changes = stage.score(maps, boxes)
            scores.append(score)
            if stage is not last:
                boxes = stage.improved(boxes, changes, score[:, 1:].argmax(1) + 1, sizes)
        selected = last.postprocess_detections(torch.stack(scores).mean(0), changes, boxes, sizes)
        places, values, labels = selected
        label = torch.cat(labels)
        masks = torch.stack([_of_label(stage.masks(maps, places), label).sigmoid() for stage in self.stages]).mean(0)
        parts = masks[:, None].split([len(b) for b in places])
        return [{"boxes": b, "scores": v, "labels": l, "masks": m}
                for b, v, l, m in zip(places, values, labels, parts, strict=True)]  # fmt: skip


def _inside(masks: Tensor, boxes: Tensor, numbers: Tensor, side: int) -> Tensor:
    """What boxes [k, 4] have of the masks [n, H, W] of these numbers [k], as [k, side, side] of 0 and 1."""
    rows = torch.cat([numbers[:, None].to(boxes), boxes], 1)
    if not len(rows):
        return boxes.new_zeros(0, side, side)
    return (roi_align(masks[:, None].float(), rows, side, 1.0, 0, aligned=True)[:, 0] >= 0.5).float()


def _of_class(changes: Tensor, labels: Tensor) -> Tensor:
    """The four numbers [n, 4] of each row's class."""
    return _of_label(changes.unflatten(1, (-1, 4)), labels)


def _of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Each row's entry [n, ...] of values [n, C + 1, ...]."""
    return values[torch.arange(len(labels), device=labels.device), labels]
