"""ResNet against timm's own model under timm's names."""

import pytest
import timm
import torch

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.interface import Backbone
from patchlight.heads.summary import MeanSummary


@pytest.mark.parametrize(("arch", "width", "blocks"), [("resnet18", 512, 8), ("resnet50", 2048, 16)])
def test_state_and_summary_are_those_of_timm(arch, width, blocks):
    resnet, theirs = build_backbone(arch).eval(), timm.create_model(arch, num_classes=0).eval()
    theirs.load_state_dict(resnet.state_dict(), strict=True)
    assert isinstance(resnet, Backbone)
    assert (resnet.width, len(resnet.blocks), resnet.patch_size, resnet.grid(224, 96)) == (width, blocks, 32, (7, 3))
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        tokens = resnet(pixels)
        assert tokens.grid == (2, 3)
        torch.testing.assert_close(MeanSummary()(tokens).summary, theirs(pixels))
        torch.testing.assert_close(tokens.patches, theirs.forward_features(pixels).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (
            lambda: build_backbone("resnet18", stem_width=4)(torch.zeros(1, 3, 48, 64)),
            "of the patch size 32, got 48x64; resize",
        ),
        (
            lambda: build_backbone("resnet18", stem_width=4)(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1) > 0),
            r"no tokens to mask .* got a mask of \(1, 1\)",
        ),
        (lambda: build_backbone("resnet18", class_token=True), "resnet18 takes .* got {'class_token': True}"),
    ],
)
def test_errors_say_what_to_do(broken, sentence):
    with pytest.raises(ValueError, match=sentence):
        broken()
