"""Backbones by name."""

import pytest
import torch

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.interface import Backbone


@pytest.mark.parametrize(
    ("arch", "width", "depth", "heads"),
    [("vit_tiny", 192, 12, 3), ("vit_small", 384, 12, 6), ("vit_base", 768, 12, 12), ("vit_large", 1024, 24, 16)],
)
def test_sizes_by_name(arch, width, depth, heads):
    with torch.device("meta"):
        backbone = build_backbone(arch, patch_size=8)
    assert isinstance(backbone, Backbone)
    assert (backbone.width, len(backbone.blocks), backbone.heads, backbone.patch_size) == (width, depth, heads, 8)
    assert backbone.grid(224, 96) == (28, 12)
    assert backbone.blocks[0].mlp.fc1.out_features == 4 * width


def test_options_override_the_name():
    backbone = build_backbone("vit_tiny", depth=1, width=12, heads=2, image_size=32, class_token=False)
    assert len(backbone.blocks) == 1
    assert not backbone.has_class_token
    assert backbone(torch.zeros(1, 3, 32, 32)).patches.shape == (1, 4, 12)


def test_an_unknown_name_lists_the_known_names():
    with pytest.raises(ValueError, match=r"arch must be one of .*vit_small, .*got 'vit_smal'; pick"):
        build_backbone("vit_smal")
