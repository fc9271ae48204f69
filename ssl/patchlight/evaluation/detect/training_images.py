"""Training images with their objects, mirrored, cut and resized at random as in DETR, which XCiT and iBOT took over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from .annotations import CocoImage, CocoPart
from .protocols import DetectProtocol

Target = dict[str, Tensor]  # as torchvision's detectors take it: boxes, labels from 1, masks


@dataclass(frozen=True)
class Sample:
    """An image and its objects while they are changed together."""

    image: Tensor  # [3, H, W] uint8
    boxes: Tensor  # [n, 4] left, top, right, bottom
    labels: Tensor  # [n] int64, from 1
    masks: Tensor  # [n, H, W] uint8

    def mirrored(self) -> Sample:
        width = self.image.shape[-1]
        left, top, right, bottom = self.boxes.unbind(1)
        boxes = torch.stack([width - right, top, width - left, bottom], 1)
        return Sample(self.image.flip(-1), boxes, self.labels, self.masks.flip(-1))

    def resized(self, short: int, long: int) -> Sample:
        """As large as `fitted` says."""
        old, new = self.image.shape[-2:], fitted(self.image.shape[-2:], short, long)
        factors = torch.tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
        masks = F.interpolate(self.masks[:, None], new)[:, 0] if len(self.masks) else self.masks.new_zeros(0, *new)
        return Sample(resized_image(self.image, new), self.boxes * factors, self.labels, masks)

    def cut(self, low: int, high: int) -> Sample:
        """A part whose sides are drawn from a range, as far as the image reaches, with what is left of its objects."""
        sides = [int(torch.randint(min(side, low), min(side, high) + 1, ())) for side in self.image.shape[-2:]]
        y, x = (int(torch.randint(0, whole - side + 1, ()))
                for whole, side in zip(self.image.shape[-2:], sides, strict=True))  # fmt: skip
        rows, columns = slice(y, y + sides[0]), slice(x, x + sides[1])
        boxes = self.boxes - torch.tensor([x, y, x, y])
        boxes = torch.minimum(boxes.clamp_min(0), torch.tensor([sides[1], sides[0]]).repeat(2))
        part = Sample(self.image[:, rows, columns], boxes, self.labels, self.masks[:, rows, columns])
        return part.kept((boxes[:, 2:] > boxes[:, :2]).all(1))

    def kept(self, rows: Tensor) -> Sample:
        """With the objects of a mask [n] bool."""
        return Sample(self.image, self.boxes[rows], self.labels[rows], self.masks[rows])


class TrainingImages(Dataset):
    """Images [3, H, W] uint8 of different sizes and their targets."""

    def __init__(self, part: CocoPart, protocol: DetectProtocol) -> None:
        self.part, self.protocol = part, protocol

    def __len__(self) -> int:
        return len(self.part)

    def name(self, index: int) -> str:
        return self.part.name(index)

    def __getitem__(self, item: int) -> tuple[Tensor, Target]:
        sample, protocol = sample_of(self.part.images[item]), self.protocol
        if torch.rand(()) < 0.5:
            sample = sample.mirrored()
        if protocol.crop_sides and torch.rand(()) < 0.5:
            sample = sample.resized(_one_of(protocol.crop_sides), protocol.long_side).cut(*protocol.crop)
        sample = sample.resized(_one_of(protocol.short_sides), protocol.long_side)
        return sample.image, {"boxes": sample.boxes, "labels": sample.labels, "masks": sample.masks}


def sample_of(image: CocoImage) -> Sample:
    """An image with its objects, without crowd regions and boxes of less than a pixel, as mmdetection has it."""
    objects = image.objects
    pixels, boxes = torch.from_numpy(image.read()).permute(2, 0, 1), torch.from_numpy(objects.boxes).float()
    whole = Sample(pixels, boxes, torch.from_numpy(objects.classes) + 1, torch.from_numpy(image.decoded_masks()))
    return whole.kept(~torch.from_numpy(objects.crowd) & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1))


def fitted(size: Sequence[int], short: int, long: int) -> tuple[int, int]:
    """The height and width of an image after its shorter side became `short`, or its longer side `long` if that is less."""
    scale = min(short / min(size), long / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resized_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image [3, H, W] uint8 in another size, bilinear and antialiased."""
    return tv.resize(image, list(size), antialias=True)


def collate(items: list) -> tuple[tuple[list[Tensor], list[Target]], Tensor, list[str]]:
    """Samples of different sizes as lists, with the numbers and reasons of unreadable ones."""
    samples, numbers, reasons = zip(*items, strict=True)
    images, targets = zip(*samples, strict=True)
    return (list(images), list(targets)), torch.tensor(numbers), list(reasons)


def _one_of(sides: tuple[int, ...]) -> int:
    return sides[int(torch.randint(len(sides), ()))]
