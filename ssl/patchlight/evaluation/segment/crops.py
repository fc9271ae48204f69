"""Random crops of scenes for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .protocols import SegmentProtocol
from .scenes import IGNORE, SceneSource


class TrainingScenes(Dataset):
    """Scenes resized, cut, mirrored and recolored at random: pixels [3, crop, crop] uint8, classes [crop, crop] int64."""

    def __init__(self, source: SceneSource, protocol: SegmentProtocol) -> None:
        self.source, self.protocol = source, protocol
        self.recolor = v2.RandomPhotometricDistort() if protocol.distort else nn.Identity()

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        scene, crop = self.source.read(item), self.protocol.crop
        image = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        classes = tv_tensors.Mask(torch.from_numpy(scene.classes)[None])
        low, high = self.protocol.scales
        short = max(1, round(crop * float(torch.empty(()).uniform_(low, high))))
        image, classes = v2.functional.resize(image, [short]), v2.functional.resize(classes, [short])
        bottom, right = (max(0, crop - side) for side in image.shape[-2:])
        image = F.pad(image, (0, right, 0, bottom))
        classes = F.pad(classes, (0, right, 0, bottom), value=IGNORE)
        image, classes = _random_crop(image, classes[0], crop)
        if torch.rand(()) < 0.5:
            image, classes = image.flip(-1), classes.flip(-1)
        return self.recolor(image.as_subclass(Tensor)), classes.as_subclass(Tensor).contiguous()


def _random_crop(image: Tensor, classes: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """A crop in which one class fills at most three quarters, as in mmsegmentation; after ten draws any crop."""
    for _ in range(10):
        y, x = (int(torch.randint(0, side - crop + 1, ())) for side in image.shape[-2:])
        part = classes[y : y + crop, x : x + crop]
        counts = part[part != IGNORE].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
            break
    return image[:, y : y + crop, x : x + crop], part
