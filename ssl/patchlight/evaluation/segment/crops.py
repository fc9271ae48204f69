"""Random crops of scenes for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import RandomResizedCrop, v2

from .protocols import SegmentProtocol
from .scenes import IGNORE, SceneSource


class TrainingScenes(Dataset):
    """Scenes resized, cut, mirrored and recolored at random: pixels [3, crop, crop] uint8, classes [crop, crop] int64."""

    def __init__(self, source: SceneSource, protocol: SegmentProtocol) -> None:
        self.source, self.protocol = source, protocol
        self.recolor = _recoloring(protocol.colors)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        scene = self.source.read(item)
        image = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        classes = tv_tensors.Mask(torch.from_numpy(scene.classes)[None])
        pixels, labels = self._cut_share(image, classes) if self.protocol.area else self._cut_scaled(image, classes)
        if torch.rand(()) < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return self.recolor(pixels.as_subclass(Tensor)), labels.as_subclass(Tensor).contiguous()

    def _cut_share(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """A random share of the image, resized to the crop."""
        assert self.protocol.area is not None
        crop = self.protocol.crop
        top, left, height, width = RandomResizedCrop.get_params(image, list(self.protocol.area), [3 / 4, 4 / 3])
        cut = lambda x: v2.functional.resized_crop(x, top, left, height, width, [crop, crop])
        return cut(image), cut(classes)[0]

    def _cut_scaled(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The image at a random scale, and a crop of it, padded where it is smaller."""
        protocol = self.protocol
        low, high = protocol.scales
        short = protocol.crop * float(torch.empty(()).uniform_(low, high))
        long = short * protocol.long_side / protocol.test_short_side
        sides = list(side_lengths((image.shape[-2], image.shape[-1]), short, long))
        image, classes = v2.functional.resize(image, sides), v2.functional.resize(classes, sides)
        bottom, right = (max(0, protocol.crop - side) for side in sides)
        image = F.pad(image, (0, right, 0, bottom))
        classes = F.pad(classes, (0, right, 0, bottom), value=IGNORE)
        return _random_crop(image, classes[0], protocol.crop)


def side_lengths(sides: tuple[int, ...], short: float, long: float) -> tuple[int, int]:
    """Height and width in the same proportion, the shorter one `short`, or less where the longer one would pass `long`;
    long: 0 for any."""
    scale = short / min(sides)
    if long:
        scale = min(scale, long / max(sides))
    height, width = (max(1, int(side * scale + 0.5)) for side in sides)
    return height, width


def _recoloring(colors: str) -> nn.Module:
    """The random change of colors by its name. distort is mmsegmentation's, jitter that of the code for ImageNet-S."""
    if colors == "distort":
        return v2.RandomPhotometricDistort(hue=(-0.1, 0.1))
    if colors == "jitter":
        return v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
            ]
        )
    return nn.Identity()


def _random_crop(image: Tensor, classes: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """A crop in which one class fills at most three quarters, as in mmsegmentation; after ten draws any crop."""
    for _ in range(10):
        y, x = (int(torch.randint(0, side - crop + 1, ())) for side in image.shape[-2:])
        part = classes[y : y + crop, x : x + crop]
        counts = part[part != IGNORE].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
            break
    return image[:, y : y + crop, x : x + crop], part
