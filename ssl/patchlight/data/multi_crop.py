"""Crops of one's own images for a DataLoader: a collate function that makes `Views` as the loaders do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check, sentence
from ..records import Crops, Views
from .interface import host_tensors
from .photometric import apply_photometric
from .policy import CropPolicy, sample_crops
from .torchvision_loader import cut


class MultiCrop:
    """Images to `Views`, with the crops of a policy: `DataLoader(dataset, batch_size=64, collate_fn=MultiCrop(policy))`.

    An item of the dataset is an image, or a tuple such as (image, label) of which the image comes first: a PIL image, or uint8
    as an array or a tensor. Where crops lie and how colors change is drawn from PyTorch's random numbers, as by torchvision's
    transforms: they differ between epochs and workers, and `torch.manual_seed` repeats them.
    """

    def __init__(self, policy: CropPolicy) -> None:
        rule = "MultiCrop takes a CropPolicy"
        check(isinstance(policy, CropPolicy), rule, f"a {type(policy).__name__}", "try dino_policy()")
        self.policy = policy

    def __call__(self, items: Sequence[Any]) -> Views:
        """The crops of a batch of items, on the CPU. `ids` number the draws; they are no numbers of images."""
        check(len(items) > 0, "MultiCrop needs images", "none", "pass a list of images")
        images = [image_of(item) for item in items]
        ids = torch.randint(2**62, (len(images),))
        sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
        crops: dict[str, Crops] = {}
        for kind, table in sample_crops(self.policy, 0, 0, ids.numpy(), sizes).items():
            pixels = torch.empty(*table.flip.shape, table.size, table.size, 3, dtype=torch.uint8)
            cut(images, table, pixels)
            numbers = host_tensors(kind, table)
            changed = apply_photometric(pixels, numbers[f"{kind}.photometric"], self.policy)
            crops[kind] = Crops(changed, numbers[f"{kind}.box"], numbers[f"{kind}.flip"])
        return Views(crops["global_crops"], crops.get("local_crops"), crops.get("query_crops"), ids)


def image_of(item: Any) -> np.ndarray:
    """An item of a dataset as [H, W, 3] uint8."""
    rule = "An item must be a PIL image or uint8 of [H, W, 3], [H, W] or (tensors) [3, H, W], alone or first in a tuple"
    image = item[0] if isinstance(item, tuple | list) and item else item
    got: Any = f"a {type(image).__name__}"
    if hasattr(image, "convert"):  # of PIL
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        first = image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] != 3
        image = (image.movedim(0, -1) if first else image).cpu().numpy()
    if isinstance(image, np.ndarray):
        got = f"{image.dtype} of {tuple(image.shape)}"
        if image.ndim == 2:
            image = image[..., None]
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] in (1, 3) and image.size:
            image = image.repeat(3, axis=-1) if image.shape[-1] == 1 else image
            return np.require(image, requirements=["C", "W"])  # else torch warns of memory that cannot be written
    remedy = "return it from the dataset as it was read, without crops, ToTensor or normalization"
    raise ValueError(sentence(rule, got, remedy))
