"""Published files of ResNet and Swin in every layout give the features of the network that they were saved from."""

import re

import pytest
import timm
import torch
import torchvision
from engine.test_init_from import VIT_LAYOUTS, prefixed, randomized, released_swin, saved, training_file
from engine.test_pairing import RESNET
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from patchlight.backbones.resnet import ResNet
from patchlight.backbones.swin import SwinTransformer as OurSwin
from patchlight.engine.assembly import build_branches
from patchlight.engine.init_from import init_from
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.evaluation.file_backbones import build_from_shapes
from patchlight.evaluation.results import results_folder
from patchlight.run import Model

HEAD = {"fc.0.weight": torch.ones(4, 4), "fc.2.bias": torch.ones(4)}


def momentum(prefix: str, weights: dict) -> dict:
    """As MoCo v2 and what is built on it save it: the network, its moving average with other values, a queue."""
    other = {name: tensor + 1 for name, tensor in weights.items()}
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": prefixed(f"{prefix}encoder_q.", weights)
        | prefixed(f"{prefix}encoder_k.", other)
        | {f"{prefix}queue": torch.ones(4, 8)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
    }


def chained(weights: dict) -> dict:
    """Network and head in a row, as OpenSelfSup saves it."""
    return prefixed("0.", weights) | {"1.mlp.0.weight": torch.ones(4, 4)}


RESNET_LAYOUTS = {
    "torchvision": lambda w: w | {"fc.weight": torch.ones(10, 4), "fc.bias": torch.ones(10)},
    "DINO": lambda w: w,
    "DINO, training": training_file,
    "MoCo v2": lambda w: momentum("module.", w | HEAD),
    "MoCo v2, without module": lambda w: momentum("", w | HEAD),
    "ReSim": lambda w: momentum(
        "module.", w | HEAD | {"fpn_lateral5.weight": torch.ones(4, 4, 1, 1), "fpn_output4.bias": torch.ones(4)}
    ),
    "MoCo v3": VIT_LAYOUTS["MoCo v3"],
    "SwAV": lambda w: prefixed(
        "module.", w | {"projection_head.0.weight": torch.ones(4, 4), "prototypes.weight": torch.ones(9, 4)}
    ),
    "SwAV, training": lambda w: {
        "state_dict": prefixed("module.", w | {"prototypes.weight": torch.ones(9, 4)}),
        "epoch": 3,
    },
    "DenseCL": lambda w: {"state_dict": w, "author": "somebody"},
    "DenseCL, training": lambda w: momentum("", chained(w)),
    "mmdetection": lambda w: {
        "meta": {"epoch": 3},
        "state_dict": prefixed("backbone.", w) | {"neck.lateral.weight": torch.ones(3)},
    },
    "Barlow Twins": lambda w: {
        "model": prefixed("module.backbone.", w) | {"module.projector.0.weight": torch.ones(4, 4)}
    },
    "BYOL": lambda w: prefixed("module.backbone.", w),
    "SimSiam": lambda w: {
        "state_dict": prefixed("module.encoder.", w | HEAD) | {"module.predictor.0.weight": torch.ones(4, 4)}
    },
    "timm": lambda w: {"state_dict": w},
}


def randomized_resnet(model: nn.Module) -> nn.Module:
    """Weights and statistics at random whose features neither vanish nor grow."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            low, high = (0.5, 1.5) if name.endswith(("weight", "running_var")) else (-0.3, 0.3)
            tensor.uniform_(low, high)
    return model.eval()


def test_resnet50_of_torchvision_gives_its_features(tmp_path):
    """An independent network of the published size, with its classifier in the file."""
    theirs = randomized_resnet(torchvision.models.resnet50(num_classes=7))
    encoder = open_checkpoint(str(saved(theirs.state_dict(), tmp_path)))
    assert isinstance(encoder.backbone, ResNet)
    assert (encoder.width, encoder.input_format.image_size) == (2048, 224)
    theirs.fc = nn.Identity()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        encoded = encoder(pixels)
        assert encoded.grid == (2, 3)
        assert encoded.summary.std() > 0.01
        torch.testing.assert_close(encoded.summary, theirs(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", RESNET_LAYOUTS)
def test_resnet_of_every_layout_gives_timms_features(layout, tmp_path):
    theirs = randomized_resnet(timm.create_model("resnet26", channels=(8, 16, 32, 64), num_classes=0))
    path = saved(RESNET_LAYOUTS[layout](dict(theirs.state_dict())), tmp_path)
    encoder = open_checkpoint(str(path))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = encoder(pixels).summary, theirs(pixels)
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_depths_are_found_in_the_shapes(arch):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)()
        ours, size = build_from_shapes({n: t for n, t in theirs.state_dict().items() if "fc" not in n}, "file")
    assert size == 224
    expected = {n: t.shape for n, t in theirs.state_dict().items() if "fc" not in n}
    assert {n: t.shape for n, t in ours.state_dict().items()} == expected


SWIN_SIZES = {
    "tiny": {"embed_dim": 8, "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16), "window_size": 2},
    "other": {"embed_dim": 12, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 4, 8), "window_size": 3},
}
SWIN_LAYOUTS = {
    "timm": lambda swin: swin.state_dict(),
    "released": lambda swin: {"model": released_swin(swin) | {"head.weight": torch.ones(3, 3)}},
    "MoBY": lambda swin: VIT_LAYOUTS["MoBY"](released_swin(swin)),
    "DINO, training": lambda swin: training_file(released_swin(swin)),
}


@pytest.mark.parametrize("size", SWIN_SIZES)
@pytest.mark.parametrize("layout", SWIN_LAYOUTS)
def test_swin_of_every_layout_gives_timms_features(layout, size, tmp_path):
    sizes = SWIN_SIZES[size]
    side = 32 * sizes["window_size"]  # the last stage is one window
    swin = randomized(SwinTransformer(side, 4, num_classes=0, **sizes))
    encoder = open_checkpoint(str(saved(SWIN_LAYOUTS[layout](swin), tmp_path)))
    backbone = encoder.backbone
    assert isinstance(backbone, OurSwin)
    assert (encoder.input_format.image_size, encoder.patch_size) == (side, 32)
    assert [len(stage.blocks) for stage in backbone.layers] == list(sizes["depths"])
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        encoded = encoder(pixels)
        torch.testing.assert_close(encoded.summary, swin(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoded.patches, swin.forward_features(pixels).flatten(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "width", "heads", "depth"), [("tiny", 96, 3, 6), ("small", 96, 3, 18), ("base", 128, 4, 18)]
)
def test_swins_published_sizes_are_found_in_their_shapes(name, width, heads, depth):
    with torch.device("meta"):
        theirs = timm.create_model(f"swin_{name}_patch4_window7_224", num_classes=0)
        ours, size = build_from_shapes(theirs.state_dict(), "file")
    assert size == 224
    assert (ours.stem_width, ours.heads, ours.width) == (width, 8 * heads, 8 * width)
    assert len(ours.layers[2].blocks) == depth
    assert {n: t.shape for n, t in ours.state_dict().items() if n != "mask_token"} == {
        n: t.shape for n, t in theirs.state_dict().items() if not n.startswith("norm.")
    }


def of_timm(name: str, **options) -> dict:
    return timm.create_model(name, num_classes=0, **options).state_dict()


NARROW = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        (lambda: of_timm("resnext50_32x4d", **NARROW), r"got grouped convolutions \(ResNeXt\)"),
        (lambda: of_timm("wide_resnet50_2", **NARROW), r"got wide bottlenecks \(Wide ResNet\)"),
        (
            lambda: of_timm("resnet18", **NARROW) | {"conv1.weight": torch.ones(128, 3, 7, 7)},
            r"got a stem of \(128, 3, 7, 7\) \(of ResNets twice as wide",
        ),
        (
            lambda: of_timm("resnet26d", **NARROW),
            r"got a stem of three convolutions \(ResNet-C or ResNet-D\) \(conv1.0.weight\)",
        ),
        (
            lambda: {f"module.{n}": t for n, t in of_timm("resnet26t", **NARROW).items()},
            r"a stem of three convolutions",
        ),
        (lambda: of_timm("seresnet18", **NARROW), "squeeze and excitation"),
        (
            lambda: of_timm("swinv2_tiny_window8_256", embed_dim=24, depths=(1, 1, 1, 1)),
            r"the attention of Swin V2 \(layers.0.blocks.0.attn.logit_scale",
        ),
        (
            lambda: of_timm("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
            r"of 2, 2, any number and 2 blocks.*got \(1, 1, 1, 1\)",
        ),
        (lambda: {"conv1.weight": torch.ones(64, 3, 7, 7)}, r"got stages of \(0, 0, 0, 0\) blocks"),
        (lambda: {k: v for k, v in of_timm("resnet18", **NARROW).items() if "running" not in k}, "missing"),
    ],
    ids=["resnext", "wide", "twice as wide", "d", "t", "se", "swin v2", "depths", "a stem", "no statistics"],
)
def test_other_networks_are_refused_by_what_they_have(weights, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        open_checkpoint(str(saved(weights(), tmp_path)))


@pytest.mark.parametrize("layout", RESNET_LAYOUTS)
def test_training_starts_from_the_same_files(layout, tmp_path):
    student, _ = build_branches(Model(**RESNET), [])
    twin, _ = build_branches(Model(**RESNET), [])
    weights = dict(randomized_resnet(twin.backbone).state_dict())
    taken = init_from(student.eval(), saved(RESNET_LAYOUTS[layout](weights), tmp_path))
    assert taken.missing == []
    assert not set(taken.unused) & set(weights)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(student.backbone(pixels).patches, twin.backbone(pixels).patches)


def test_a_random_start_is_the_same_each_time():
    name = "random:vit_tiny,depth=2,width=64,heads=2,patch_size=8,image_size=32"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = open_checkpoint(name), open_checkpoint(name)
    assert torch.equal(torch.get_rng_state(), before), "and draws nothing from others"
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert (first.width, first.depth, first.patch_size, first.input_format.image_size) == (64, 2, 8, 32)
    assert first.notes == ("freshly initialized with seed 0: nothing was learned",)
    assert not first.training
    assert open_checkpoint("random:swin_tiny,depth=1,stem_width=32").depth == 1
    assert open_checkpoint("random:vit_tiny,depth=1", heads=6).backbone.heads == 6
    for wrong, part in (
        ("random:vit_tiny,depth=two", r"then sizes: width, depth.*got 'depth=two'"),
        ("random:vit_tiny,deep=2", "got 'deep=2'"),
        ("random:vit_tiny,depth=0", "got 'depth=0'"),
        ("random:vit_huge", "arch must be one of"),
        ("random:resnet18,width=8", "resnet18 takes .*got {'width': 8}"),
        ("random:vit_tiny,width=64,heads=5", "heads must divide width"),
    ):
        with pytest.raises(ValueError, match=part):
            open_checkpoint(wrong)
    assert re.fullmatch(r"evaluation/random-vit_tiny-depth-2[\w-]+", results_folder(name).as_posix())
