"""Published files of every layout: the loaded model computes the same, and all other tensors are listed."""

import argparse
import re

import pytest
import timm
import torch
from engine.test_pairing import CROPS, RESNET, SWIN
from engine.tiny_run import DINO, SELFPATCH, tiny_run, tiny_trainer
from parity import ROOT
from rich.console import Console
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from patchlight.backbones.vit import VisionTransformer
from patchlight.engine.assembly import build_branches
from patchlight.engine.init_from import init_from
from patchlight.heads.summary import ClassAttentionSummary
from patchlight.run import Model

SIZES = {"width": 16, "depth": 2, "heads": 2}
MODEL = {"patch_size": 4, "image_size": 16, "sizes": SIZES, "drop_path": 0.0}


def randomized(module: nn.Module) -> nn.Module:
    """All weights random, so that one that is not loaded changes the result."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return module.eval()


def timm_vit(**options) -> timm.models.vision_transformer.VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    return randomized(timm.models.vision_transformer.VisionTransformer(**{**sizes, **options}))


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def training_file(weights: dict, more: dict | None = None) -> dict:
    """As DINO and methods built on it save it: a student with other weights, and heads in both."""
    teacher = prefixed("backbone.", weights) | {"head.mlp.0.weight": torch.ones(3, 3)} | (more or {})
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="vit_small"), "epoch": 7}


VIT_LAYOUTS = {
    "timm": lambda w: w,
    "DINO": training_file,
    "iBOT": lambda w: {"state_dict": {**w, "masked_embed": torch.ones(1, 16)}},
    "SERE": lambda w: training_file({**w, "pixel_sere.projection.0.weight": torch.ones(16)}),
    "PQCL": lambda w: training_file({**w, "query_block.norm1.weight": torch.ones(16), "norm2.weight": torch.ones(16)}),
    "MoCo v3": lambda w: {
        "state_dict": prefixed("module.base_encoder.", w)
        | {f"module.momentum_encoder.{name}": tensor + 1 for name, tensor in w.items()}
        | {"module.base_encoder.head.0.weight": torch.ones(4, 4), "module.predictor.0.weight": torch.ones(4, 4)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
    "MoBY": lambda w: {
        "model": prefixed("encoder.", w)
        | {f"encoder_k.{name}": tensor + 1 for name, tensor in w.items()}
        | {"queue1": torch.ones(4, 8), "projector.linear_out.weight": torch.ones(4, 4)}
    },
}


def saved(content: dict, folder, name: str = "weights.pth"):
    path = folder / name
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
def test_a_vit_of_every_layout_gives_timms_features(layout, tmp_path):
    vit = timm_vit()
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    taken = init_from(student.eval(), saved(VIT_LAYOUTS[layout](vit.state_dict()), tmp_path))
    assert taken.layout.startswith(f"{layout}, ")
    assert len(taken.loaded) == len(vit.state_dict()) + (layout == "iBOT")
    assert taken.missing == ([] if layout == "iBOT" else ["backbone.mask_token"])
    assert taken.reshaped == []
    assert bool(taken.unused) == (layout in ("SERE", "PQCL", "MoCo v3"))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.backbone(pixels).cls, vit(pixels), rtol=1e-5, atol=1e-5)
    if layout == "iBOT":
        assert (student.backbone.mask_token == 1).all()


def test_a_selfpatch_file_has_its_aggregation_head(tmp_path):
    """A backbone without class token and norm; the head has its released names."""
    vit = randomized(VisionTransformer(**SIZES, patch_size=4, image_size=16, class_token=False))
    head = randomized(ClassAttentionSummary(16, 2))
    names = {n: re.sub(r"(blocks\.\d\.)([qkv]|proj)\.", r"cls_\1attn.\2.", n) for n in head.state_dict()}
    names = {n: re.sub(r"^blocks", "cls_blocks", new) for n, new in names.items()}
    ca_head = {f"ca_head.{names[n]}": tensor for n, tensor in head.state_dict().items()}
    weights = {n: tensor for n, tensor in vit.state_dict().items() if n != "mask_token"}
    path = saved(training_file(weights, ca_head), tmp_path)
    student, _ = build_branches(Model("vit_tiny", summary="class_attention", **MODEL), [])
    taken = init_from(student.eval(), path)
    assert taken.layout == "SelfPatch, teacher.backbone"
    assert taken.missing == ["backbone.mask_token"]
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        result, expected = student.summary(student.backbone(pixels)), head(vit(pixels))
    assert torch.equal(result.summary, expected.summary)
    assert torch.equal(result.patches, expected.patches)


def test_the_final_norm_is_loaded_where_it_is_applied(tmp_path):
    vit = timm_vit()
    student, _ = build_branches(Model("vit_tiny", summary="mean", **MODEL), [])
    taken = init_from(student.eval(), saved(vit.state_dict(), tmp_path))
    assert taken.unused == ["cls_token"]
    assert torch.equal(student.summary.norm.weight, vit.norm.weight)
    assert taken.reshaped == ["backbone.pos_embed 1x17x16 to 1x16x16"]
    assert torch.equal(student.backbone.pos_embed, vit.pos_embed[:, 1:])


@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2_scales_are_folded_in(chunks, tmp_path):
    vit = timm_vit(init_values=1.0)
    weights = vit.state_dict()
    if chunks:
        weights = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", name): tensor for name, tensor in weights.items()}
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    taken = init_from(student.eval(), saved(weights, tmp_path))
    assert taken.layout == "DINOv2, the backbone alone"
    assert taken.unused == []
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.backbone(pixels).cls, vit(pixels), rtol=1e-4, atol=1e-4)


def released_swin(swin: SwinTransformer) -> dict:
    """The names of the released code: a stage ends with its merging, and tables are stored."""
    names = {n: re.sub(r"^layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", n) for n in swin.state_dict()}
    weights = {names[name]: tensor for name, tensor in swin.state_dict().items()}
    return weights | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64)}


@pytest.mark.parametrize("window", [4, 2])
def test_swin_of_moby(window, tmp_path):
    """Windows of another size get their bias tables resampled."""
    swin = randomized(
        SwinTransformer(32, 2, embed_dim=8, depths=(2, 2, 1, 2), num_heads=(2, 4, 8, 16), window_size=4, num_classes=0,
                        dynamic_img_size=True)
    )  # fmt: skip
    model = {**SWIN, "sizes": {**SWIN["sizes"], "window": window}}
    student, _ = build_branches(Model(**model), [])
    taken = init_from(student.eval(), saved(VIT_LAYOUTS["MoBY"](released_swin(swin)), tmp_path))
    assert taken.layout == "MoBY, model.encoder"
    assert taken.missing == ["backbone.mask_token"]
    assert taken.unused == []
    assert all(name.split(" ")[0].endswith("bias_table") for name in taken.reshaped)
    assert bool(taken.reshaped) == (window == 2)
    if window == 4:
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            summary = student.summary(student.backbone(pixels)).summary
            torch.testing.assert_close(summary, swin(pixels), rtol=1e-4, atol=1e-4)


def test_resnet_of_moco_v3(tmp_path):
    student, _ = build_branches(Model(**RESNET), [])
    twin, _ = build_branches(Model(**RESNET), [])
    weights = randomized(twin.backbone).state_dict() | {"fc.0.weight": torch.ones(3, 3)}
    taken = init_from(student.eval(), saved(VIT_LAYOUTS["MoCo v3"](weights), tmp_path))
    assert taken.missing == []
    assert set(taken.unused) == {"fc.0.weight", "head.0.weight"}
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(student.backbone(pixels).patches, twin.backbone(pixels).patches)


def test_positions_of_another_grid_are_resampled(tmp_path):
    vit = timm_vit(img_size=24)
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    taken = init_from(student, saved(vit.state_dict(), tmp_path))
    assert taken.reshaped == ["backbone.pos_embed 1x37x16 to 1x17x16"]
    image = vit.pos_embed[:, 1:].detach().unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(student.backbone.pos_embed[:, 1:], expected)
    assert torch.equal(student.backbone.pos_embed[:, :1], vit.pos_embed[:, :1])


def test_a_fixed_table_accepts_only_its_own_kind(tmp_path):
    model = Model("vit_tiny", positions="sincos_rows_first", **MODEL)
    student, twin = build_branches(model, [])
    init_from(student, saved(twin.backbone.state_dict(), tmp_path, "same.pth"))
    assert torch.equal(student.backbone.pos_embed, twin.backbone.pos_embed)
    with pytest.raises(ValueError, match=r"keeps a fixed table, got another one .*set it to the file's kind"):
        init_from(student, saved(timm_vit().state_dict(), tmp_path))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"optimizer": {"x": torch.ones(2)}}, r"must hold a ViT, Swin or ResNet .* got 1 tensors such as \['optimizer.x'\]"),
        ({"conv1.weight": torch.ones(2)}, r"got none of its \d+ tensors .*\(timm, the backbone alone\).*choose the Model.arch"),
        (timm_vit(patch_size=8).state_dict(), r"got 16x3x8x8 for backbone.patch_embed.proj.weight"),
        (timm_vit(embed_dim=24).state_dict(), r"got 1x1x24 for backbone.cls_token, which is \(1, 1, 16\)"),
        ({**timm_vit().state_dict(), "pos_embed": torch.ones(1, 12, 16)}, r"of a square grid .* got 1x12x16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(weights, sentence, tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    with pytest.raises(ValueError, match=sentence):
        init_from(student, saved(weights, tmp_path))


class Unknown:
    pass


def test_missing_files_and_files_with_objects_are_refused(tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    with pytest.raises(ValueError, match=r"plain values, got objects in .*save the state dict alone"):
        init_from(student, saved({"model": {}, "config": Unknown()}, tmp_path))
    with pytest.raises(FileNotFoundError, match="must name a file of weights, got"):
        init_from(student, tmp_path / "nowhere.pth")


def test_a_run_starts_both_branches_from_the_file_and_prints_a_table(tmp_path, capsys):
    vit = timm_vit(embed_dim=20)
    path = tmp_path / "weights.safetensors"
    save_file(vit.state_dict(), path)
    model = {"image_size": 16, "patch_size": 4, "sizes": {"width": 20, "depth": 2, "heads": 2}, "init_from": str(path)}
    trainer = tiny_trainer(tiny_run(tmp_path, model=model))
    for branch in (trainer.student, trainer.teacher):
        assert torch.equal(branch.backbone.blocks[1].mlp.fc2.weight, vit.blocks[1].mlp.fc2.weight)
    output = capsys.readouterr().out
    assert re.search(rf"loaded\W+{len(vit.state_dict())}\b", output)
    assert "backbone.mask_token" in output


def test_the_table_names_a_few_and_counts_the_rest(tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    taken = init_from(student, saved(timm_vit().state_dict(), tmp_path))
    with Console(width=400) as console, console.capture() as captured:
        console.print(taken.table())
    assert f"and {len(taken.loaded) - 8} more" in captured.get()


@pytest.mark.parametrize("kind", ["vit", "selfpatch", "swin", "resnet"])
def test_torch_hub_gives_the_exported_teacher(kind, tmp_path):
    vit = {**MODEL, "sizes": {**SIZES, "width": 20}}
    model = {"vit": vit, "selfpatch": {**vit, "summary": "class_attention"}, "swin": SWIN, "resnet": RESNET}[kind]
    data = {"crops": CROPS[model["arch"]]} if "arch" in model else {}
    options = (DINO, SELFPATCH) if kind == "selfpatch" else (DINO,)
    trainer = tiny_trainer(tiny_run(tmp_path, options=options, model=model, data=data))
    randomized(trainer.teacher)
    trainer.save()
    exported = trainer.checkpoints.all()[-1] / "teacher.safetensors"
    hub = torch.hub.load(str(ROOT), "teacher", source="local", path=str(exported))
    size = trainer.run.data.crops.global_crops[0].size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = trainer.teacher.summary(trainer.teacher.backbone(pixels))
        from_hub = hub.forward_features(pixels)
    expected = {
        "vit": lambda: from_hub[:, 1:],
        "selfpatch": lambda: from_hub,
        "swin": lambda: from_hub.flatten(1, 2),
        "resnet": lambda: from_hub.flatten(2).transpose(1, 2),
    }[kind]()
    torch.testing.assert_close(features.patches, expected, rtol=1e-4, atol=1e-4)
