"""Views from one's own images: the crops of the loaders, in a DataLoader, and what is no image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from patchlight.data.multi_crop import MultiCrop
from patchlight.data.policy import dino_policy, pqcl_policy
from patchlight.data.procedural import ProceduralSource
from patchlight.data.torchvision_loader import TorchvisionLoader

POLICY = dino_policy(2, 32, 16)


class Images:
    """A dataset as anybody writes it: (PIL image, label)."""

    def __init__(self) -> None:
        self.source = ProceduralSource(12, 48)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int):
        return Image.fromarray(self.source.read(number)), number


def test_crops_are_those_of_the_loaders(monkeypatch):
    """For the same draws, bit for bit."""
    source = ProceduralSource(6, 48)
    expected = next(TorchvisionLoader(source, POLICY, 6))
    monkeypatch.setattr(torch, "randint", lambda *_: expected.ids)
    views = MultiCrop(POLICY)([source.read(int(number)) for number in expected.ids])
    for mine, theirs in zip(views.tensors(), expected.tensors(), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_loader_every_epoch_has_other_crops_and_a_seed_repeats_them(workers):
    def epochs() -> list:
        torch.manual_seed(3)
        loader = DataLoader(Images(), batch_size=6, collate_fn=MultiCrop(POLICY), num_workers=workers)
        return [views for _ in range(2) for views in loader]

    views, again = epochs(), epochs()
    assert [tuple(v.global_crops.pixels.shape) for v in views] == [(2, 6, 3, 32, 32)] * 4
    assert [tuple(v.local_crops.pixels.shape) for v in views] == [(2, 6, 3, 16, 16)] * 4
    boxes = torch.cat([v.global_crops.box for v in views], dim=1).flatten(0, 1)
    assert len(boxes.unique(dim=0)) == len(boxes), "no crop twice: of no worker, batch or epoch"
    pairs = [pair for a, b in zip(views, again, strict=True) for pair in zip(a.tensors(), b.tensors(), strict=True)]
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_batch_goes_to_a_device_whole():
    views = MultiCrop(pqcl_policy(1, 16, global_size=32))([np.zeros((40, 50, 3), np.uint8)] * 2)
    assert views.local_crops is None and views.query_crops.pixels.shape == (1, 2, 3, 16, 16)
    moved = views.to("meta")
    assert all(tensor.is_meta for tensor in moved.tensors()) and len(moved.tensors()) == len(views.tensors()) == 7
    assert not views.ids.is_meta


def test_items_are_those_of_other_sources():
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    items = [array, (Image.fromarray(array), 3), {"image": torch.from_numpy(array).permute(2, 0, 1)}]
    torch.manual_seed(1)
    expected = MultiCrop(POLICY)([array] * 3)
    torch.manual_seed(1)
    assert torch.equal(MultiCrop(POLICY)(items).global_crops.pixels, expected.global_crops.pixels)
    with pytest.raises(
        ValueError, match=r"item 1 of a batch must be a Pillow image, .*, got a tensor \[3, 4, 4\] of float32; give"
    ):
        MultiCrop(POLICY)([array, torch.zeros(3, 4, 4)])


def test_what_is_no_batch_or_policy_is_a_sentence():
    with pytest.raises(ValueError, match="MultiCrop needs images, got none; pass a list"):
        MultiCrop(POLICY)([])
    with pytest.raises(ValueError, match="takes a CropPolicy, got a int; try"):
        MultiCrop(224)


def test_boxes_lie_in_images_of_their_own_sizes():
    sizes = [(20, 60), (60, 20), (33, 40)]
    views = MultiCrop(POLICY)([np.zeros((height, width, 3), np.uint8) for height, width in sizes])
    for image, (height, width) in enumerate(sizes):
        x, y, w, h = views.global_crops.box[:, image].unbind(-1)
        assert ((x >= 0) & (y >= 0) & (x + w <= width) & (y + h <= height)).all()
