"""Any module as a backbone: what is found by trying it, timm's models, and what is no backbone."""

import pytest
import timm
import torch
from torch import Tensor, nn

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.timm_backbone import TimmBackbone
from patchlight.backbones.wrapped import ModuleBackbone, wrap_backbone

VIT = {"num_classes": 0, "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def timm_vit(**given) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, "dynamic_img_size": True, **given})
    with torch.no_grad():  # so that norms and positions count
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class Returns(nn.Module):
    """A module with one parameter that returns what a function makes of its images."""

    def __init__(self, make) -> None:
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.ones(())), make

    def forward(self, pixels: Tensor):
        return self.make(pixels * self.weight)


def cells(pixels: Tensor) -> Tensor:
    """[M, 12, rows, columns] of 4 x 4 pixels each, as means."""
    return nn.functional.avg_pool2d(pixels, 4).repeat(1, 4, 1, 1)


def rows(pixels: Tensor, first: int = 0) -> Tensor:
    tokens = cells(pixels).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :first], tokens], dim=1)


def test_a_map_and_tokens_are_the_same_patches():
    pixels = torch.randn(2, 3, 16, 24)
    map_, plain, with_class = (
        wrap_backbone(Returns(make), 16) for make in (cells, rows, lambda pixels: rows(pixels, first=1))
    )
    for backbone in (map_, plain, with_class):
        assert (backbone.width, backbone.patch_size, backbone.heads) == (12, 4, 1)
        tokens = backbone(pixels)
        assert tokens.grid == (4, 6)
        assert torch.equal(tokens.patches, rows(pixels))
        assert (tokens.cls is not None) == backbone.has_class_token == (backbone is with_class)
    assert torch.equal(with_class(pixels).cls, rows(pixels)[:, 0])
    assert with_class.capabilities == {"class_token"} and not map_.capabilities
    with pytest.raises(ValueError, match=r"is a module of images only, got a mask; use a ViT"):
        map_(pixels, mask=torch.zeros(2, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"multiples of the patch size 4, got 18x16; resize"):
        plain(torch.randn(1, 3, 18, 16))


def test_a_backbone_of_ours_is_itself():
    ours = build_backbone("resnet18", stem_width=4)
    assert wrap_backbone(ours) is ours


def test_trying_changes_nothing():
    module = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5).eval())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    numbers = torch.random.get_rng_state()
    backbone = wrap_backbone(module, 32)
    assert isinstance(backbone, ModuleBackbone) and backbone.model is module
    assert module[1].training and not module[2].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), numbers)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (None, r"must be an nn.Module, got a NoneType; pass the network"),
        (nn.Conv2d, r"must be an nn.Module, got a class; pass the network"),
        (nn.Identity(), r"must have parameters, got Identity without any; pass a network"),
        (
            Returns(lambda x: x.mean((2, 3))),
            r"a feature map .*got the shape \(1, 3\) for an image of 32x32; remove its pool",
        ),
        (Returns(lambda x: {"x": x}), r"got a dict for an image of 32x32; wrap it in a module"),
        (
            Returns(lambda x: cells(x).permute(0, 2, 3, 1)),
            r"got \(1, 8, 8, 12\), with the width at the end; return x.perm",
        ),
        (Returns(lambda x: rows(x, first=3)), r"got the shape \(1, 67, 12\) for an image of 32x32; wrap"),
        (Returns(lambda x: cells(x)[..., :5]), r"got the shape \(1, 12, 8, 5\)"),
        (
            Returns(lambda x: cells(x)[..., :5, :5]),
            r"must divide those of the image, got 5 for an image of 32 pixels; pass",
        ),
        (
            nn.Linear(7, 7),
            r"Linear as a backbone must take images .*got RuntimeError: .* for an image of 32x32; pass the im",
        ),
    ],
)
def test_what_is_no_backbone_is_a_sentence(module, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrap_backbone(module, 32)


@pytest.mark.parametrize("given", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_a_timm_vit_gives_its_own_features(given):
    """Patches after the final norm, if it is inside; blocks; patches before that norm."""
    model, pixels = timm_vit(**given), torch.randn(2, 3, 32, 48)
    backbone = wrap_backbone(model)
    assert isinstance(backbone, TimmBackbone)
    assert (backbone.width, backbone.patch_size, backbone.heads, len(backbone.blocks)) == (24, 8, 2, 3)
    with torch.no_grad():
        tokens, expected = backbone(pixels, layers=(0, -1)), model.forward_features(pixels)
        assert tokens.grid == (4, 6)
        prefix = model.num_prefix_tokens
        assert torch.equal(tokens.patches, expected[:, prefix:])
        assert backbone.has_class_token == (prefix > 0)
        if prefix:
            assert torch.equal(tokens.cls, expected[:, 0])
            assert torch.equal(tokens.layers[1], torch.cat([tokens.cls[:, None], tokens.patches], 1))
            before = backbone(pixels, residual=True)
            torch.testing.assert_close(model.norm(before.residual), before.patches)
            assert torch.equal(before.patches, tokens.patches)
        else:
            assert not backbone.has_final_norm and torch.equal(tokens.layers[1], tokens.patches)
        assert not torch.equal(tokens.layers[0], tokens.layers[1])


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_masked_patch_of_a_timm_vit_counts_for_nothing(dynamic):
    """Whatever lies under the mask, the features are the same; and the mask token gets a gradient."""
    backbone = wrap_backbone(timm_vit(dynamic_img_size=dynamic))
    nn.init.normal_(backbone.mask_token)
    first, second = torch.randn(2, 2, 3, 32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, 8:] = True
    hidden = mask.view(2, 1, 4, 1, 4, 1).expand(-1, -1, -1, 8, -1, 8).reshape(2, 1, 32, 32)
    second = torch.where(hidden, second, first)
    one, other = backbone(first, mask).patches, backbone(second, mask).patches
    assert torch.equal(one, other)
    assert not torch.equal(backbone(first).patches, backbone(second).patches)
    one.sum().backward()
    assert backbone.mask_token.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 16\)"):
        backbone(first, mask[:, 1:])


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resnet18", {"channels": (4, 8, 8, 16)}),
        ("convnext_atto", {"dims": (4, 8, 8, 16), "depths": (1, 1, 1, 1)}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
    ],
)
def test_other_timm_models_give_what_timm_pools(name, given):
    """Swin after its final norm, rows and columns in their order."""
    model = timm.create_model(name, num_classes=0, **given).eval()
    backbone, pixels = wrap_backbone(model), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens, expected = backbone(pixels), model.forward_features(pixels)
    if name.startswith(("resnet", "convnext")):
        expected = expected.permute(0, 2, 3, 1)
    assert torch.equal(tokens.patches, expected.reshape(tokens.patches.shape))
    assert tokens.grid[0] * tokens.grid[1] == tokens.patches.shape[1]
    assert not backbone.capabilities
    with pytest.raises(ValueError, match="mask"):
        backbone(pixels, torch.zeros(1, tokens.patches.shape[1], dtype=torch.bool))


def test_a_timm_model_of_one_size_says_so():
    backbone = wrap_backbone(timm_vit(dynamic_img_size=False))
    with pytest.raises(
        ValueError, match=r"for images of 32x32 pixels only, got 48x32; create it with dynamic_img_size=True"
    ):
        backbone(torch.randn(1, 3, 48, 32))
