"""Published files of every layout: the loaded model computes the same, and all other tensors are listed."""

import argparse
import os
import pickle
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
from patchlight.recipes import command
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


def mae_file(vit: nn.Module) -> dict:
    """Encoder and decoder under one prefix; the mask token is the decoder's."""
    decoder = {"decoder_embed.weight": torch.ones(8, 16), "decoder_pos_embed": torch.ones(1, 17, 8)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.bias": torch.ones(48)}
    return {"model": {**vit.state_dict(), "mask_token": torch.ones(1, 1, 8), **decoder}}


def test_the_encoder_of_mae_is_a_plain_vit(tmp_path):
    vit = timm_vit()
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    taken = init_from(student.eval(), saved(mae_file(vit), tmp_path))
    assert taken.layout == "MAE, model"
    assert taken.missing == ["backbone.mask_token"]
    assert len(taken.unused) == 5, "the decoder and its mask token"
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.backbone(pixels).cls, vit(pixels), rtol=1e-5, atol=1e-5)


def test_deit_iii_has_layer_scales_and_no_position_of_its_class_token(tmp_path):
    vit = timm_vit(init_values=1.0, no_embed_class=True)
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    assert init_from(student.eval(), saved(vit.state_dict(), tmp_path)).unused == []
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.backbone(pixels).cls, vit(pixels), rtol=1e-4, atol=1e-4)


def timm_eva(**options) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.models.eva.Eva(**{**sizes, **options})


def released_dinov3() -> dict:
    """The names of the released files: no position table, as positions are rotary."""
    weights = timm_vit(init_values=1.0).state_dict()
    del weights["pos_embed"]
    more = {
        "rope_embed.periods": torch.ones(4),
        "storage_tokens": torch.ones(1, 4, 16),
        "mask_token": torch.ones(1, 16),
    }
    return weights | more | {"blocks.0.attn.qkv.bias_mask": torch.ones(48)}


DINOV3 = {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "num_reg_tokens": 4, "init_values": 1.0, "qkv_bias": False}
BEIT = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 1.0}
OTHERS = {  # networks that ours do not compute, and what the error must name
    "DINOv3 as released": (
        released_dinov3,
        ["rotary positions (rope_embed.periods)", "register tokens (storage_tokens)"],
    ),
    "DINOv3 of timm": (lambda: timm_eva(**DINOV3).state_dict(), ["register tokens (reg_token)", "layer scales as in"]),
    "RoPE-ViT": (
        lambda: timm_eva(use_rot_pos_emb=True, init_values=1.0).state_dict(),
        ["layer scales as in BEiT, EVA"],
    ),
    "EVA": (
        lambda: timm_eva().state_dict(),
        ["separate projections of queries, keys and values (blocks.0.attn.q_bias)"],
    ),
    "EVA-02": (
        lambda: timm_eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False).state_dict(),
        ["gated MLPs (SwiGLU)", "q_proj"],
    ),
    "BEiT": (
        lambda: timm.models.beit.Beit(16, 4, embed_dim=16, depth=2, num_heads=2, **BEIT).state_dict(),
        ["relative position biases (blocks.0.attn.relative_position_bias_table)", "(blocks.0.gamma_1)"],
    ),
    "CLIP of timm": (lambda: timm_vit(pre_norm=True).state_dict(), ["a norm before the blocks (norm_pre.weight)"]),
    "CLIP's image side": (
        lambda: {"conv1.weight": torch.ones(16, 3, 4, 4), "class_embedding": torch.ones(16)},
        ["the layout of OpenAI's CLIP (class_embedding)"],
    ),
    "registers": (lambda: timm_vit(reg_tokens=4).state_dict(), ["register tokens (reg_token)"]),
    "norms of queries": (lambda: timm_vit(qk_norm=True).state_dict(), ["norms of queries and keys"]),
    "DeiT, distilled": (
        lambda: {**timm_vit().state_dict(), "dist_token": torch.ones(1, 1, 16)},
        ["distillation token"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_that_ours_do_not_compute_is_refused_by_what_it_has(name, tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    build, parts = OTHERS[name]
    with pytest.raises(
        ValueError, match=r"must be of a plain ViT, Swin or ResNet.*; start from weights without"
    ) as error:
        init_from(student, saved(build(), tmp_path))
    for part in parts:
        assert part in str(error.value)


def without(weights: dict, *starts: str) -> dict:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (lambda: timm_vit(depth=3).state_dict(), r"got 12 of the file .* no place for, such as blocks.2.norm1.weight.*sizes"),
        (lambda: timm_vit(depth=1).state_dict(), r"12 of its own that the file lacks, such as backbone.blocks.1.norm1.weight"),
        (lambda: without(timm_vit().state_dict(), "pos_embed"), r"1 of its own that the file lacks, such as backbone.pos_embed"),
        (lambda: timm_vit(class_token=False, global_pool="avg", fc_norm=False).state_dict(), r"cls_token, .* to \"mean\""),
        (lambda: {**timm_vit().state_dict(), "neck.weight": torch.ones(3)}, r"no place for, such as neck.weight"),
        (lambda: timm_vit(qkv_bias=False).state_dict(), r"2 of its own that the file lacks, such as backbone.blocks.0.attn.qkv"),
    ],
)  # fmt: skip
def test_a_network_with_more_or_fewer_parts_is_refused(weights, sentence, tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        init_from(student, saved(weights(), tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_heads_decoders_and_predictors_of_any_name_may_be_left_out(tmp_path):
    names = [
        "head.0.weight",
        "head_dist.bias",
        "fc_norm.weight",
        "projection_head.0.bias",
        "prototypes.weight",
        "predictor.x",
    ]
    names += ["decoder_blocks.0.norm1.bias", "attn_pool.q.weight", "queue1"]
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    more = {name: torch.ones(3) for name in names}
    assert init_from(student, saved({**timm_vit().state_dict(), **more}, tmp_path)).unused == names


def test_a_vit_without_class_token_starts_a_model_without_one(tmp_path):
    vit = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    student, _ = build_branches(Model("vit_tiny", summary="mean", **MODEL), [])
    taken = init_from(student.eval(), saved(vit.state_dict(), tmp_path))
    assert (taken.missing, taken.unused) == (["backbone.mask_token"], [])
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        patches = student.summary(student.backbone(pixels)).patches
        torch.testing.assert_close(patches, vit.forward_features(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2_scales_are_folded_in(chunks, tmp_path):
    vit = timm_vit(init_values=1.0)
    weights = vit.state_dict()
    if chunks:
        weights = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", name): tensor for name, tensor in weights.items()}
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    taken = init_from(student.eval(), saved(weights, tmp_path))
    assert taken.layout == "DINOv2 or DeiT III, the backbone alone"
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


def test_a_fixed_table_of_another_grid_must_be_of_its_kind_too(tmp_path):
    larger = build_branches(Model("vit_tiny", positions="sincos_rows_first", **{**MODEL, "image_size": 24}), [])[1]
    path = saved(larger.backbone.state_dict(), tmp_path)
    student, _ = build_branches(Model("vit_tiny", positions="sincos_rows_first", **MODEL), [])
    init_from(student, path)
    student, _ = build_branches(Model("vit_tiny", positions="sincos", **MODEL), [])
    with pytest.raises(ValueError, match="keeps a fixed table"):
        init_from(student, path)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"optimizer": {"x": torch.ones(2)}}, r"must hold a ViT, Swin or ResNet .* got 1 tensors such as \['optimizer.x'\]"),
        ({"conv1.weight": torch.ones(2)}, r"got none of its \d+ tensors .*\(timm, the backbone alone\).*choose the Model.arch"),
        (timm_vit(patch_size=8).state_dict(), r"got 16x3x8x8 for backbone.patch_embed.proj.weight"),
        (timm_vit(embed_dim=24).state_dict(), r"got 1x1x24 for backbone.cls_token, which is \(1, 1, 16\)"),
        ({**timm_vit().state_dict(), "pos_embed": torch.ones(1, 12, 16)}, r"of a square grid .* got 1x12x16"),
        ({**timm_vit().state_dict(), "pos_embed": torch.ones(17)}, r"of a square grid .* got 17"),
        ({**timm_vit().state_dict(), "blocks.0.mlp.fc1.weight": torch.ones(16, 64)}, r"got 16x64 for .*fc1.weight"),
        ({**timm_vit().state_dict(), "norm.bias": torch.full((16,), torch.nan)}, r"got 16 of 16 values of norm.bias that"),
        ({**timm_vit().state_dict(), "norm.bias": torch.tensor(1e300).double()}, r"got 1 of 1 values of norm.bias"),
        ({**timm_vit().state_dict(), "norm.bias": torch.ones(16).int()}, r"got torch.int32 for norm.bias in"),
        ({**timm_vit().state_dict(), "norm.bias": torch.ones(1).expand(16)}, r"another kind for norm.bias in"),
        ({**timm_vit().state_dict(), "norm.bias": torch.ones(16).to_sparse()}, r"another kind for norm.bias in"),
        ({**timm_vit().state_dict(), "blocks.0.ls1.gamma": torch.ones(3)}, r"must fit its layer, got \(3,\) for blocks.0.ls1"),
        ({**timm_vit().state_dict(), "blocks.7.0.norm1.weight": torch.ones(16)}, r"one name, got 1 with two"),
        ([torch.ones(3)], r"must hold tensors by name, got a list in"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(weights, sentence, tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    with pytest.raises(ValueError, match=sentence):
        init_from(student, saved(weights, tmp_path))


class Unknown:
    pass


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_nothing_in_a_file_is_executed(tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    canary = tmp_path / "canary"
    path = saved({**timm_vit().state_dict(), "note": Malicious(canary)}, tmp_path)
    with pytest.raises(ValueError, match=r"got objects in .* such as posix.mkdir"):
        init_from(student, path)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(canary)))
    with pytest.raises(ValueError, match=r"bare.pth"):
        init_from(student, tmp_path / "bare.pth")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_is_named_in_one_sentence(name, tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    weights = timm_vit().state_dict()
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    whole = path.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "short": whole[:9], "text": b"<html>404</html>", "zeros": bytes(1000)}
    for kind, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a whole .pth or .safetensors file, got ") as error:
            init_from(student, path)
        assert str(path) in str(error.value), kind
        assert "\n" not in str(error.value), kind
        assert len(str(error.value)) < 500 + len(str(path)), kind


def test_dictionaries_without_end_are_refused(tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    circle: dict = dict(timm_vit().state_dict())
    circle["again"] = circle
    many: dict = {}
    for _ in range(25):
        many = {"a": many, "b": many}
    for content in (circle, many):
        with pytest.raises(ValueError, match="must have at most 1000000 entries in 32 levels, got more in"):
            init_from(student, saved(content, tmp_path))


def test_what_is_no_file_is_named(tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    (tmp_path / "folder.pth").mkdir()
    for name, kind, sentence in (
        ("empty.pth", ValueError, "which is empty; copy or download it again"),
        ("folder.pth", ValueError, "which is a folder; pass a file in it"),
        ("loop.pth", FileNotFoundError, "which is no file; check the path"),
        ("empty.pth/more.pth", FileNotFoundError, "which is no file"),
        ("x" * 5000, FileNotFoundError, "which is no file"),
    ):
        with pytest.raises(kind, match=sentence):
            init_from(student, tmp_path / name)
    path = saved(timm_vit().state_dict(), tmp_path)
    path.chmod(0)
    if os.geteuid():  # an administrator reads it all the same
        with pytest.raises(ValueError, match="Permission denied; make it readable"):
            init_from(student, path)


def test_missing_files_and_files_with_objects_are_refused(tmp_path):
    student, _ = build_branches(Model("vit_tiny", **MODEL), [])
    with pytest.raises(ValueError, match=r"plain values, got objects in .*save the state dict alone"):
        init_from(student, saved({"model": {}, "config": Unknown()}, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"with content that can be read, got .*nowhere.pth, which is no file"):
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


def test_torch_hub_names_a_file_that_it_cannot_read(tmp_path):
    def hub(path) -> nn.Module:
        return torch.hub.load(str(ROOT), "teacher", source="local", path=str(path))

    path, weights = tmp_path / "teacher.safetensors", timm_vit(embed_dim=64).state_dict()
    with pytest.raises(FileNotFoundError, match=r"path must be a file, got .*teacher.safetensors, which is none"):
        hub(path)
    save_file(weights, path)
    assert torch.equal(hub(path).cls_token, weights["cls_token"])
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"<html>"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"teacher.safetensors of a run.*got .*teacher.safetensors, which cannot be read"
        ):
            hub(path)
    save_file({**weights, "reg_token": torch.ones(1, 4, 64)}, path)
    with pytest.raises(
        ValueError, match=r"which cannot be read \(RuntimeError: Error.*; copy it again from its checkpoint"
    ):
        hub(path)
    save_file({**weights, "norm.bias": torch.full((64,), torch.nan)}, path)
    with pytest.raises(ValueError, match=r"got 1 tensors that are not, such as norm.bias, in"):
        hub(path)
    save_file(weights, path)
    (tmp_path / "facts.json").write_text("{")
    with pytest.raises(ValueError, match=r"with its facts.json or without.*JSONDecodeError"):
        hub(path)
    (tmp_path / "facts.json").unlink()
    save_file(timm_vit().state_dict(), path)
    with pytest.raises(ValueError, match=r"heads must be given where 64 does not divide the width, got 16; pass heads"):
        hub(path)


def test_a_run_from_a_file_that_is_none_ends_with_one_sentence(tmp_path, monkeypatch):
    """And not with a traceback; the exit code is 1."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"<html>404</html>")
    run = tiny_run(tmp_path / "run", model={"init_from": str(path)})
    monkeypatch.setattr(command, "_run_of", lambda *_: run)
    sentence = r"^train.py: A file of weights must be a whole .* got .*weights.pth, [^\n]*\.$"
    with pytest.raises(SystemExit, match=sentence) as ended:
        command.main(["debug"])
    assert ended.value.code == 1
