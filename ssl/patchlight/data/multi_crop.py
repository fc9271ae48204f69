"""Crops of one's own images for a DataLoader: a collate function that makes `Views` as the loaders do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..checks import check
from ..records import Crops, Views
from .interface import host_tensors
from .items import image_in, read_image
from .photometric import apply_photometric
from .policy import CropPolicy, sample_crops
from .stored import MOST_PIXELS
from .torchvision_loader import cut


class MultiCrop:
    """Images to `Views`, with the crops of a policy: `DataLoader(dataset, batch_size=64, collate_fn=MultiCrop(policy))`.

    An item of the dataset is what `train(source=...)` takes: a Pillow image, an array or a tensor of uint8, the bytes of a file
    or its path; alone, first in a tuple such as (image, label), or as "image" in a dict. Where crops lie and how colors change
    is drawn from PyTorch's random numbers, as by torchvision's transforms: they differ between epochs and workers, and
    `torch.manual_seed` repeats them.
    """

    def __init__(self, policy: CropPolicy) -> None:
        rule = "MultiCrop takes a CropPolicy"
        check(isinstance(policy, CropPolicy), rule, f"a {type(policy).__name__}", "try dino_policy()")
        self.policy = policy

    def __call__(self, items: Sequence[Any]) -> Views:
        """The crops of a batch of items, on the CPU. `ids` number the draws; they are no numbers of images."""
        check(len(items) > 0, "MultiCrop needs images", "none", "pass a list of images")
        images = [read_image(image_in(item, f"item {n} of a batch"), MOST_PIXELS) for n, item in enumerate(items)]
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
