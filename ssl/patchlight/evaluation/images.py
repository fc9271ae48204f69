"""Images that an evaluation reads: opened by a path, and their centers cut out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..checks import sentence
from ..data.procedural import ProceduralSource
from ..data.sources import open_source
from ..data.stored import Images, Source

PROCEDURAL = "procedural"  # in place of a path: images that are drawn instead of read


def open_images(path: str, procedural_images: int = 512) -> Source:
    """Images that need no labels: a folder, a list, or `procedural`."""
    return ProceduralSource(procedural_images, seed=1) if path == PROCEDURAL else open_source(path)


class CenterCrops(Dataset):
    """uint8 [3, size, size] and its number: the shorter side resized (bicubic, antialiased) and the center cut out."""

    def __init__(self, source: Images, ids: np.ndarray, size: int, resize_to: int) -> None:
        self.source, self.ids, self.size, self.resize_to = source, ids, size, resize_to

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        number = int(self.ids[item])
        try:
            image = torch.from_numpy(self.source.read(number)).permute(2, 0, 1)
        except Exception as error:  # decoders raise errors of any type for a damaged file
            got = f"{type(error).__name__}: {error} for {self.source.name(number)}"
            raise OSError(
                sentence("Every image of an evaluation must be readable", got, "repair or remove it")
            ) from error
        return tv.center_crop(tv.resize(image, [self.resize_to], InterpolationMode.BICUBIC), [self.size]), number


def resize_side(size: int, whole: bool) -> int:
    """The shorter side before the center is cut out: the papers' 256 / 224 of the size, or the size for whole images."""
    return size if whole else round(size * 256 / 224)
