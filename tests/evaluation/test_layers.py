"""Layers of a backbone for rates that depend on depth: exact numbers by name, one group per parameter, drop path."""

import pytest
import timm
import torch
from torch import nn

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.timm_backbone import TimmBackbone
from patchlight.backbones.vit import DropPath
from patchlight.backbones.wrapped import wrap_backbone
from patchlight.evaluation.encoder import set_drop_path
from patchlight.evaluation.layers import parameter_layers
from patchlight.evaluation.training import layer_groups

SIZES = {
    "vit_tiny": {"width": 24, "depth": 3, "heads": 2, "patch_size": 8, "image_size": 32},
    "swin_tiny": {"stem_width": 8, "depth": 2, "head_width": 4, "window": 2, "image_size": 64},
    "resnet18": {"stem_width": 4, "image_size": 64},
}
# By the beginning of a parameter's name, written down by hand: the stem, each block of each stage in order, and what
# leads to a stage with the stage's first block.
LAYERS = {
    "vit_tiny": {
        0: ["cls_token", "pos_embed", "patch_embed."],
        1: ["blocks.0."],
        2: ["blocks.1."],
        3: ["blocks.2."],
        4: ["norm."],
    },
    "swin_tiny": {
        0: ["patch_embed."],
        1: ["layers.0.blocks.0."],
        2: ["layers.0.blocks.1."],
        3: ["layers.1.downsample.", "layers.1.blocks.0."],
        4: ["layers.1.blocks.1."],
        5: ["layers.2.downsample.", "layers.2.blocks.0."],
        6: ["layers.2.blocks.1."],
        7: ["layers.3.downsample.", "layers.3.blocks.0."],
        8: ["layers.3.blocks.1."],
        9: ["norm."],
    },
    "resnet18": {
        0: ["conv1.", "bn1."],
        **{number: [f"layer{1 + (number - 1) // 2}.{(number - 1) % 2}."] for number in range(1, 9)},
    },
}
TIMM = {
    "vit_tiny": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 64}),
    "swin_tiny": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16), "window_size": 2, "img_size": 64},
    ),
    "resnet18": ("resnet18", {"channels": (4, 8, 16, 32)}),
}


def backbone_of(arch: str, origin: str):
    if origin == "ours":
        return build_backbone(arch, **SIZES[arch])
    name, sizes = TIMM[arch]
    return TimmBackbone(timm.create_model(name, num_classes=0, **sizes))


@pytest.mark.parametrize("origin", ["ours", "timm"])
@pytest.mark.parametrize("arch", LAYERS)
def test_every_parameter_is_in_its_layer(arch, origin):
    backbone, expected = backbone_of(arch, origin), LAYERS[arch]
    found, top = parameter_layers(backbone)
    names = [name for name, _ in backbone.named_parameters() if name != "mask_token"]
    assert sorted(found) == sorted(names)
    assert top == max(layer for layer, starts in expected.items() if starts != ["norm."]) + 1
    for name, layer in found.items():
        assert name.removeprefix("model.").startswith(tuple(expected[layer])), f"{name} is not of layer {layer}"


@pytest.mark.parametrize("origin", ["ours", "timm"])
@pytest.mark.parametrize("arch", LAYERS)
def test_groups_have_the_rates_of_their_layers(arch, origin):
    backbone, head = backbone_of(arch, origin), nn.Linear(8, 3)
    layers, top = parameter_layers(backbone)
    groups = layer_groups(backbone, head, 0.5, 0.05)
    given = [id(p) for group in groups for p in group["params"]]
    named = {name: p for name, p in backbone.named_parameters() if name != "mask_token"}
    assert sorted(given) == sorted(map(id, [*named.values(), *head.parameters()])), "each in exactly one group"
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in named.items():
        undecayed = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token", "bias_table"))
        assert scale[id(parameter)] == (0.5 ** (top - layers[name]), 0.0 if undecayed else 0.05), name
    assert scale[id(head.weight)] == (1.0, 0.05)
    assert {group["lr_scale"] for group in layer_groups(backbone, head, 1.0, 0.05)} == {1.0}


def test_more_models_of_timm_and_no_unknown_one():
    convnext = TimmBackbone(timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 8, 8), num_classes=0))
    layers, top = parameter_layers(convnext)
    assert top == 6
    assert layers["model.stem.0.weight"] == 0
    assert layers["model.stages.2.downsample.1.weight"] == layers["model.stages.2.blocks.0.conv_dw.weight"] == 3
    other = wrap_backbone(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU()), 32)
    head = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"backbone whose layers are known.*got Sequential; set layer_decay to 1"):
        layer_groups(other, head, 0.65, 0.05)
    assert len(layer_groups(other, head, 1.0, 0.05)) == 2
    with pytest.raises(ValueError, match=r"residual blocks.*got 0.1 for ModuleBackbone; set drop_path to 0"):
        set_drop_path(other, 0.1)
    set_drop_path(other, 0.0)


@pytest.mark.parametrize("origin", ["ours", "timm"])
@pytest.mark.parametrize(("arch", "blocks", "each"), [("vit_tiny", 3, 2), ("swin_tiny", 8, 2), ("resnet18", 8, 1)])
def test_drop_path_rises_over_all_blocks(arch, blocks, each, origin):
    backbone = backbone_of(arch, origin)
    pixels = torch.randn(2, 3, 64, 64)
    set_drop_path(backbone, 0.35)
    rates = [module.rate for module in backbone.modules() if isinstance(module, DropPath)]
    expected = [0.35 * number / (blocks - 1) for number in range(1, blocks) for _ in range(each)]
    assert rates == pytest.approx(expected)
    for name, parameter in backbone.named_parameters():
        if "bn" in name and name.endswith("weight"):  # timm starts a ResNet with branches of zero
            nn.init.ones_(parameter)
    with torch.no_grad():
        kept = backbone.eval()(pixels).patches
        set_drop_path(backbone, 1 - 1e-6)
        backbone.eval()
        assert torch.equal(backbone(pixels).patches, kept), "evaluation drops nothing"
        for module in backbone.modules():
            module.training = isinstance(module, DropPath)  # BatchNorm keeps its statistics
        assert (backbone(pixels).patches - kept).abs().max() > 1e-3, "the rate is that of the blocks that run"
        set_drop_path(backbone, 0.0)
        assert torch.equal(backbone(pixels).patches, kept)
    assert not any(isinstance(module, DropPath) for module in backbone.modules())
