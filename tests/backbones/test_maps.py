"""Feature maps for dense heads: channels and strides are those that a backbone names, and the last map is that of its patches."""

import pytest
import timm
import torch

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.interface import MapLevel, map_blocks
from patchlight.backbones.timm_backbone import TimmBackbone
from patchlight.backbones.wrapped import wrap_backbone
from patchlight.evaluation.pyramid import STRIDES, Pyramid

OURS = {
    "vit": lambda: build_backbone("vit_tiny", image_size=64, depth=4),
    "vit, patches of 8": lambda: build_backbone("vit_tiny", image_size=64, patch_size=8, depth=4),
    "vit without class token": lambda: build_backbone("vit_tiny", image_size=64, depth=4, class_token=False),
    "swin": lambda: build_backbone("swin_tiny", image_size=64, depth=2),
    "resnet": lambda: build_backbone("resnet18", stem_width=16),
    "timm vit": lambda: TimmBackbone(timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)),
    "timm swin": lambda: TimmBackbone(
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, strict_img_size=False)
    ),
    "timm resnet": lambda: TimmBackbone(timm.create_model("resnet18", num_classes=0)),
    "timm convnext": lambda: TimmBackbone(timm.create_model("convnext_atto", num_classes=0)),
}


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_maps_are_those_that_the_backbone_names(name):
    backbone, side = OURS[name]().eval(), 224 if name.startswith("timm") else 64
    pixels = torch.randn(2, 3, side, side)
    maps, levels = backbone.maps(pixels), backbone.map_levels
    assert [(m.shape[1], side // m.shape[2]) for m in maps] == [(level.channels, level.stride) for level in levels]
    pyramid = Pyramid(levels).eval()
    assert [(m.shape[1], side // m.shape[3]) for m in pyramid(maps)] == list(
        zip(pyramid.channels, STRIDES, strict=True)
    )
    tokens = backbone(pixels, residual=True) if "vit" in name else backbone(pixels)
    patches = tokens.residual if "vit" in name else tokens.patches
    if not name.startswith("timm swin") and not name.startswith("timm conv"):  # those have a norm after the last map
        torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), patches)


def test_a_vit_gives_the_published_blocks():
    assert map_blocks(12) == (3, 5, 7, 11)
    assert map_blocks(12, (3, 6, 9, 12)) == (2, 5, 8, 11)
    assert map_blocks(24, (3, 6, 9, 12)) == (5, 11, 17, 23)
    assert map_blocks(2) == (0, 0, 0, 1)
    assert map_blocks(1) == (0, 0, 0, 0)


def test_a_backbone_of_one_map_is_refused_by_heads_that_need_four():
    backbone = wrap_backbone(torch.nn.Conv2d(3, 8, 16, 16), 64)
    assert backbone.map_levels == (MapLevel(8, 16),)
    assert backbone.maps(torch.randn(1, 3, 64, 64))[0].shape == (1, 8, 4, 4)
    with pytest.raises(ValueError, match="four feature maps"):
        Pyramid(backbone.map_levels)
    with pytest.raises(ValueError, match="power of two"):
        Pyramid([MapLevel(8, 12)] * 4)
