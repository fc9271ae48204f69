"""The Swin transformer against timm's own model under timm's names."""

import pytest
import timm
import torch
from torch import nn

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.interface import Backbone
from patchlight.backbones.swin import SwinTransformer


def small_swin(**options) -> SwinTransformer:
    sizes = {"stem_width": 8, "depth": 1, "head_width": 4, "window": 3, "patch_size": 16, "image_size": 48}
    return SwinTransformer(**{**sizes, **options})


@pytest.mark.parametrize(
    ("arch", "timm_name", "width", "heads"),
    [
        ("swin_tiny", "swin_tiny_patch4_window7_224", 768, 24),
        ("swin_small", "swin_small_patch4_window7_224", 768, 24),
        ("swin_base", "swin_base_patch4_window7_224", 1024, 32),
    ],
)
def test_parameters_are_those_of_timm(arch, timm_name, width, heads):
    with torch.device("meta"):
        swin, theirs = build_backbone(arch), timm.create_model(timm_name, num_classes=0)
    ours = {name: tensor.shape for name, tensor in swin.named_parameters() if name != "mask_token"}
    norm = {"norm.weight", "norm.bias"}  # the summary's
    assert ours == {name: tensor.shape for name, tensor in theirs.named_parameters() if name not in norm}
    assert isinstance(swin, Backbone)
    assert (swin.width, swin.heads, swin.patch_size, swin.grid(224, 96)) == (width, heads, 32, (7, 3))
    assert len(swin.blocks) == sum(len(stage.blocks) for stage in theirs.layers)


def test_features_are_those_of_timm():
    swin = build_backbone("swin_tiny").eval()
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0).eval()
    theirs.norm = nn.Identity()
    state = swin.state_dict()
    state.pop("mask_token")
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(swin(pixels).patches, theirs.forward_features(pixels).flatten(1, 2))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 48), (32, 16), (96, 96)])
def test_any_multiple_of_the_last_stages_patch(height, width):
    swin = small_swin()
    tokens = swin(torch.randn(2, 3, height, width))
    assert tokens.grid == (height // 16, width // 16)
    assert tokens.patches.shape == (2, tokens.grid[0] * tokens.grid[1], 64)
    assert tokens.cls is None


def test_a_smaller_image_is_padded_as_in_a_model_of_its_size():
    """Windows of 3 on the grids 8, 4, 2, 1 of a 16-pixel image: as timm's model for any size computes it."""
    swin = small_swin(image_size=48).eval()
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=48,
        patch_size=2,
        embed_dim=8,
        depths=(2, 2, 1, 2),
        num_heads=(2, 4, 8, 16),
        window_size=3,
        num_classes=0,
        dynamic_img_size=True,
    ).eval()
    theirs.norm = nn.Identity()
    theirs.load_state_dict(swin.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(swin(pixels).patches, theirs.forward_features(pixels).flatten(1, 2))


def test_a_masked_patch_hides_its_own_pixels_and_no_others():
    swin = small_swin(window=2)
    nn.init.normal_(swin.mask_token)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 2
    pixels = torch.randn(2, 3, 48, 48, requires_grad=True)
    masked = swin(pixels, mask).patches
    torch.testing.assert_close(masked[1], swin(pixels).patches[1])
    masked.square().sum().backward()
    hidden = torch.zeros(48, 48, dtype=torch.bool)
    hidden[16:32, 32:48] = True
    assert (pixels.grad[0][:, hidden] == 0).all()
    assert (pixels.grad[0][:, ~hidden] != 0).float().mean() > 0.99
    assert swin.mask_token.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (lambda: small_swin(head_width=3), "head_width must divide stem_width, got 3 and 8"),
        (lambda: small_swin()(torch.zeros(1, 3, 40, 48)), "multiples of the patch size 16, got 40x48; resize"),
        (lambda: small_swin()(torch.zeros(1, 3, 48, 48), layers=(0,)), r"grids of their own, got layers=\(0,\)"),
        (lambda: small_swin()(torch.zeros(1, 3, 48, 48), torch.zeros(1, 4) > 0), r"bool of shape \(1, 9\).*\(1, 4\)"),
        (lambda: small_swin(image_size=40), "multiples of the patch size 16"),
    ],
)
def test_errors_say_what_to_do(broken, sentence):
    with pytest.raises(ValueError, match=sentence):
        broken()
