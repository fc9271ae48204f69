"""Every head takes every backbone, with the maps that it is meant to have; a backbone of one map gets a sentence."""

import pytest
import timm
import torch
from parity import SEED

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.interface import as_map
from patchlight.backbones.timm_backbone import TimmBackbone
from patchlight.backbones.wrapped import wrap_backbone
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.features import Reading
from patchlight.evaluation.ranks import Ranks
from patchlight.evaluation.segment.benchmark import evaluate_segment
from patchlight.evaluation.segment.features import MAPS, NORMED_MAPS, PATCHES, features_of, has_one_grid
from patchlight.evaluation.segment.model import Segmenter
from patchlight.evaluation.segment.protocols import ConvSegment, FpnSegment, LinearSegment, UperNetSegment
from patchlight.evaluation.segment.scenes import open_scenes
from patchlight.heads.summary import ClassTokenSummary, MeanSummary, build_summary

BACKBONES = {
    "vit": lambda: build_backbone("vit_tiny", image_size=64, depth=2),
    "vit without class token": lambda: build_backbone("vit_tiny", image_size=64, depth=2, class_token=False),
    "swin": lambda: build_backbone("swin_tiny", image_size=64, depth=2),
    "resnet": lambda: build_backbone("resnet18", stem_width=16),
    "timm vit": lambda: TimmBackbone(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=4)
    ),
    "timm resnet": lambda: TimmBackbone(timm.create_model("resnet18", num_classes=0)),
    "timm convnext": lambda: TimmBackbone(timm.create_model("convnext_atto", num_classes=0)),
}
SMALL = {
    "steps": 1, "warmup": 0, "batch": 2, "crop": 64, "test_short_side": 64, "colors": "none", "scales": (1.0, 1.0),
}  # fmt: skip
PROTOCOLS = (
    LinearSegment(**SMALL),
    ConvSegment(**SMALL, epochs=0, warmup_epochs=0, area=None),
    FpnSegment(**SMALL, channels=8),
    UperNetSegment(**SMALL, channels=8, helper_channels=4),
)


def encoder_of(name: str) -> Encoder:
    torch.manual_seed(SEED)
    backbone = BACKBONES[name]()
    summary = ClassTokenSummary() if backbone.has_class_token else MeanSummary()
    if name == "vit without class token":
        summary = build_summary("mean", backbone)
    return Encoder(backbone, summary, name, InputFormat(64)).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_head_takes_every_backbone(name):
    """Odd sides too; and every weight of backbone and head that should be trained has a gradient."""
    encoder = encoder_of(name)
    pixels = torch.randn(2, 3, 61, 90)
    for protocol in PROTOCOLS:
        model = Segmenter(encoder, protocol.build_head(encoder, 5), protocol.features)
        model.train()
        maps = model(pixels)
        assert all(m.shape[:2] == (2, 5) for m in maps)
        rows, columns = maps[0].shape[-2:]
        assert rows < columns
        model.zero_grad()
        sum(m.square().mean() for m in maps).backward()
        assert all(p.grad is not None for p in model.head.parameters()), type(protocol).__name__
        if not protocol.frozen:
            assert sum(p.grad is not None for p in encoder.backbone.parameters()) > 5


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_stages_are_trained_and_tested(name):
    scenes = open_scenes("procedural", procedural_images=4)
    found = evaluate_segment(encoder_of(name), scenes, PROTOCOLS[2], Ranks(torch.device("cpu")), Reading(workers=0))
    assert 0 <= found.metrics["mIoU"] <= 1


def test_features_are_the_last_patches_or_four_maps():
    pixels = torch.randn(1, 3, 64, 64)
    for name in ("vit", "vit without class token", "timm vit"):
        encoder = encoder_of(name)
        assert has_one_grid(encoder.map_levels)
        (patches,) = features_of(encoder, pixels, PATCHES)
        encoded = encoder(pixels)
        assert torch.equal(patches, as_map(encoded.patches, encoded.grid))
        raw, normed = features_of(encoder, pixels, MAPS), features_of(encoder, pixels, NORMED_MAPS)
        assert len(raw) == len(normed) == 4
        torch.testing.assert_close(normed[-1], patches, msg="the last map, after the final norm, is the last patches")
        norm = encoder.summary.norm if name == "vit without class token" else encoder.backbone.get_submodule(
            "model.norm" if name == "timm vit" else "norm"
        )  # fmt: skip
        torch.testing.assert_close(norm(raw[0].movedim(1, -1)).movedim(-1, 1), normed[0])
    encoder = encoder_of("swin")
    assert not has_one_grid(encoder.map_levels)
    stages = features_of(encoder, pixels, NORMED_MAPS)
    assert all(torch.equal(a, b) for a, b in zip(stages, encoder.maps(pixels), strict=True))


def test_the_width_of_upernet_is_that_of_a_vit():
    vit, resnet = encoder_of("vit"), encoder_of("resnet")
    assert UperNetSegment().build_head(vit, 3).fuse[0].out_channels == vit.width == 192
    assert UperNetSegment().build_head(resnet, 3).fuse[0].out_channels == 512


def test_a_backbone_of_one_map_takes_the_heads_of_patches_only():
    backbone = wrap_backbone(torch.nn.Conv2d(3, 8, 16, 16), 64)
    encoder = Encoder(backbone, MeanSummary(), "one map", InputFormat(64))
    for protocol in PROTOCOLS[:2]:
        model = Segmenter(encoder, protocol.build_head(encoder, 5), protocol.features)
        assert model(torch.randn(2, 3, 60, 64))[0].shape == (2, 5, 4, 4)
    for protocol in PROTOCOLS[2:]:
        with pytest.raises(
            ValueError, match=r"four feature maps.*got 1; use one of these, or the linear and conv heads"
        ):
            protocol.build_head(encoder, 5)
