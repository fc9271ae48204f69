"""The checks of recorded cases read their sizes from the file: recordings of other sizes pass, and changed values fail.

A recording here is an existing one with parts left out, or made from inputs of other sizes. For the latter, our own code
takes the place of the released code: a `Recorder` keeps what a check computes instead of comparing it. That these
values are right is tested by the real recordings.
"""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import harness
import pytest
import torch
from harness import Case
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

harness.load_checks()
pytestmark = pytest.mark.golden


class Recorder(Case):
    """Keeps what a check computes, in fp32, as training steps are recorded in too."""

    def close(self, key: str, actual: Tensor, rel: float, floor: float | Tensor = 0.0) -> None:
        self.tensors[key] = actual.detach().float().clone()


class Collector(Case):
    """Collects the keys that differ instead of stopping at the first."""

    def close(self, key: str, actual: Tensor, rel: float, floor: float | Tensor = 0.0) -> None:
        try:
            super().close(key, actual, rel, floor)
        except AssertionError:
            self.differing = {*getattr(self, "differing", ()), key}


def path_of(name: str) -> Path:
    return Path(__file__).parent / f"{name}.safetensors"


def without(name: str, *parts: str) -> Case:
    """An existing recording without the tensors whose key has one of the parts."""
    case = Case(path_of(name))
    case.tensors = {key: value for key, value in case.tensors.items() if not any(part in key for part in parts)}
    return case


def write(case: Case, folder: Path) -> Path:
    path = folder / f"{case.name}.safetensors"
    meta = {**case.meta, "config": json.dumps(case.config)} if case.config else case.meta
    save_file({key: value.detach().clone().contiguous() for key, value in case.tensors.items()}, path, meta)
    return path


def run(case: Case) -> None:
    torch.manual_seed(0)
    harness.check_for(case.name)(case)


def record(name: str, change: Callable[[Case], None]) -> Case:
    """A recording by our code, from the inputs of an existing one after a change."""
    case = Recorder(path_of(name))
    change(case)
    run(case)
    return case


def one_local_crop(case: Case) -> None:
    for step in range(case.step_count()):
        key = f"step{step}.input.student_logits"
        case.tensors[key] = case[key][: 3 * case.config["batch"]]
    case.config["local_crops"] = 1


def no_local_crops(case: Case) -> None:
    case.config["local_crops"] = 0
    case.tensors = {key: value for key, value in case.tensors.items() if "_local_" not in key}


def a_third_global_crop(case: Case) -> None:
    for step in range(case.step_count()):
        for kind in ("student_cls", "student_patch", "teacher_cls", "teacher_patch"):
            rows = case[f"step{step}.input.{kind}"]
            case.tensors[f"step{step}.input.{kind}"] = torch.cat([rows, rows[: case.config["batch"]].flip(-1)])
        case.tensors[f"step{step}.input.mask_crop2"] = case[f"step{step}.input.mask_crop1"].flip(1)


def a_single_local_view(case: Case) -> None:
    case.meta["n_local"] = "1"
    case.tensors["rects_local"] = case["rects_local"][:1]
    removed = ("x_student_local_1", "x_student_local_2")
    case.tensors = {key: value for key, value in case.tensors.items() if not key.endswith(removed)}


def three_steps(case: Case, local_crops: int) -> None:
    """A third step in the same epoch as the second, and another number of local crops."""
    case.config["epoch_of_step"] = [0, 1, 1]
    for name in ("lr", "weight_decay", "ema_momentum"):
        case.config[name] = [*case.config[name], case.config[name][0] / 2]
    for key in [key for key in case.tensors if key.startswith("step1.")]:
        case.tensors[key.replace("step1", "step2")] = case[key].flip(-1) if ".input." in key else case[key]
    recorded, side = case.config["local_crops"], case.config["local_size"]
    for step in range(3):
        for crop in range(local_crops):
            shape = case.config["batch"], 3, side, side
            case.tensors[f"step{step}.input.crop{2 + crop}"] = torch.randn(shape)
        for crop in range(local_crops, recorded):
            del case.tensors[f"step{step}.input.crop{2 + crop}"]
    case.config["local_crops"] = local_crops


def masks_from_epoch_one(case: Case) -> None:
    """Steps of iBOT, the first in an epoch without masks; its loss has weights."""
    three_steps(case, 3)
    case.config |= {"mim_start_epoch": 1, "lambda1": 0.5, "lambda2": 2.0}
    for crop in range(2):
        case.tensors[f"step0.input.mask_crop{crop}"].zero_()


def separate_heads_in_both(case: Case) -> None:
    """The teacher starts as a copy of the student; patches have more prototypes than the class token."""
    case.config |= {"shared_head_teacher": False, "patch_out_dim": 44}
    for part in ("weight_g", "weight_v"):
        shape = 44, *case[f"step0.weight.student.head.last_layer2.{part}"].shape[1:]
        start = torch.ones(shape) if part == "weight_g" else torch.randn(shape)
        case.tensors[f"step0.weight.student.head.last_layer2.{part}"] = start
        case.tensors[f"final.weight.teacher.head.last_layer2.{part}"] = start
    case.tensors = {key: value for key, value in case.tensors.items() if not key.startswith("step0.weight.teacher.")}


def one_layer_without_qkv_bias(case: Case) -> None:
    """A head with a single layer, whose names in the released code have no number."""
    removed = ("head.mlp.", "qkv.bias")
    case.tensors = {key: value for key, value in case.tensors.items() if not any(part in key for part in removed)}
    order = [name for name in json.loads(case.meta["param_order"]) if not any(part in name for part in removed)]
    case.meta["param_order"] = json.dumps([*order, "head.mlp.weight", "head.mlp.bias"])
    out = case.config["bottleneck_dim"]
    for name, shape in {"weight": (out, case.config["embed_dim"]), "bias": (out,)}.items():
        for place in ("step0.weight.student", "step0.grad.student", "final.weight.student", "final.weight.teacher"):
            case.tensors[f"{place}.head.mlp.{name}"] = torch.randn(shape)


def later_schedule(case: Case) -> None:
    """The released schedule of the patches' temperature: constant, then a warm-up."""
    c = case.config
    c |= {"mim_start_epoch": 2, "lambda1": 0.5, "epoch_of_step": [0, 20]}
    ends = c["warmup_teacher_patch_temp"], c["teacher_patch_temp"]
    constant, warmup = c["mim_start_epoch"], c["warmup_teacher_temp_epochs"]
    full = lambda count, value: torch.full((count,), value, dtype=torch.float64)
    rising = torch.linspace(*ends, warmup, dtype=torch.float64)
    schedule = torch.cat([full(constant, ends[0]), rising, full(c["nepochs"] - constant - warmup, ends[1])])
    case.tensors["output.teacher_patch_temp_schedule"] = schedule
    for step, epoch in enumerate(c["epoch_of_step"]):
        case.tensors[f"step{step}.input.teacher_patch_temp"] = schedule[epoch]


def no_qkv_bias(case: Case) -> None:
    case.config["qkv_bias"] = False
    case.tensors = {key: value for key, value in case.tensors.items() if "qkv.bias" not in key}


def wider_window(case: Case) -> None:
    case.config |= {"window": 5, "k": [3, 11]}


RECORDED_HERE = {  # what differs: the existing recording, the change, and a key whose value is then changed
    "one local crop": ("dino_loss_2g3l", one_local_crop, "step2.output.center"),
    "three global crops": ("ibot_loss_2g3l_4x4", a_third_global_crop, "step1.grad.input.student_patch"),
    "no local crops in SelfPatch": ("selfpatch_loss_4x4_2x2", no_local_crops, "step1.output.loss_patch"),
    "one local view in SERE": ("sere_step_locals_a", a_single_local_view, "grad_pixel.x_student_local_0"),
    "patch temperature with a late warm-up": ("ibot_loss_2g3l_4x4", later_schedule, "step1.output.loss"),
    "three steps, three local crops": (
        "dino_train_step",
        lambda case: three_steps(case, 3),
        "step2.grad.student.head.mlp.0.weight",
    ),
    "no local crops": (
        "dino_train_step",
        lambda case: three_steps(case, 0),
        "final.weight.teacher.head.mlp.2.weight",
    ),
    "a head of one layer, no bias of queries, keys and values": (
        "dino_train_step",
        one_layer_without_qkv_bias,
        "final.weight.teacher.head.mlp.weight",
    ),
    "masks from epoch one": ("ibot_train_step_shared", masks_from_epoch_one, "step2.output.loss_patch"),
    "separate heads in both branches": (
        "ibot_train_step_default_heads",
        separate_heads_in_both,
        "final.weight.teacher.head.last_layer2.weight_v",
    ),
    "no bias of queries, keys and values": (
        "dino_vit_48x32_interp",
        no_qkv_bias,
        "grad.weight.blocks.1.attn.qkv.weight",
    ),
    "window of five": ("selfpatch_head_loc_true_6x6_k1248", wider_window, "output.tokens.k11"),
}


@pytest.mark.parametrize("what", RECORDED_HERE)
def test_recordings_of_other_sizes(what, tmp_path):
    name, change, key = RECORDED_HERE[what]
    path = write(record(name, change), tmp_path)
    run(Case(path))
    assert_a_changed_value_fails(path, key)


@pytest.mark.parametrize(
    ("name", "other"),
    {
        "lr": [0.001, 0.0008],
        "ema_momentum": [0.9, 0.9],
        "student_temp": 0.2,
        "adamw": {"betas": [0.8, 0.999], "eps": 1e-8},
        "clip_grad": 0.2,
        "freeze_last_layer_epochs": 0,
    }.items(),
)
def test_the_metadata_is_used(name, other):
    case = Case(path_of("dino_train_step"))
    assert case.config[name] != other
    case.config[name] = other
    with pytest.raises(AssertionError):
        run(case)


def assert_a_changed_value_fails(path: Path, key: str) -> None:
    case = Case(path)
    assert case[key].any(), f"{key} is zero"
    case.tensors[key] = case[key] * 1.01
    with pytest.raises(AssertionError, match=key):
        run(case)


PARTS = {  # what remains: the part of a recording, and a key whose value is then changed
    "two steps": (lambda: without("moby_step_a", "step2.", "step3.", "final."), "step1.queue2"),
    "one step": (lambda: without("mocov3_lars_a", "gw1", "gb1", "w2", "b2", "gw2", "gb2", "w3", "b3"), "w1"),
    "two target grids": (lambda: without("dino_pos_embed_interp", "10x7"), "output.pos_embed.6x6"),
    "no maps of boundaries": (lambda: without("davis_jf_pairs_a", "boundary_"), "J"),
    "no attention": (lambda: without("dino_vit_32x32", "last_attention", "after_block"), "output.cls"),
    "one anchor": (lambda: without("pqcl_derived_relpos_flips_b", "_centre"), "pos_embed_top_left"),
    "no queries before normalization": (lambda: without("moby_loss_b", "_unnormalized"), "grad_q"),
}


@pytest.mark.parametrize("what", PARTS)
def test_parts_of_recordings(what, tmp_path):
    build, key = PARTS[what]
    path = write(build(), tmp_path)
    run(Case(path))
    assert_a_changed_value_fails(path, key)


def test_mask_statistics_under_another_name(tmp_path):
    case = Case(path_of("ibot_masks"))
    of_size = {key: value for key, value in case.tensors.items() if key.endswith("block_0.3_6x6")}
    case.tensors = {key.replace("block_0.3_6x6", "any"): value for key, value in of_size.items()}
    case.config = {"any": {**case.config["block_0.3_6x6"]}}
    path = write(case, tmp_path)
    run(Case(path))
    case.config["any"]["pred_ratio"] = 0.4
    with pytest.raises(AssertionError, match="any"):
        run(case)


def test_a_table_of_another_window(tmp_path):
    case, side, reach = Case(path_of("selfpatch_local_index")), 6, range(-2, 3)
    case.tensors = {
        f"output.neighbours.{side}x{side}.window5": torch.tensor(
            [
                sorted({(y + dy) % side * side + (x + dx) % side for dy in reach for dx in reach} - {y * side + x})
                for y in range(side)
                for x in range(side)
            ]
        )
    }
    path = write(case, tmp_path)
    run(Case(path))
    case.tensors = {key: value.roll(1, 0) for key, value in case.tensors.items()}
    with pytest.raises(AssertionError, match="window5"):
        run(case)


def released_head(layers: int, norm: str | None, act: str, out: int) -> nn.Module:
    """A head with the released names, in plain PyTorch: in_dim 7, hidden 9, bottleneck 5."""
    shared = {"ln": nn.LayerNorm, "bn": nn.BatchNorm1d}[norm](9) if norm else None
    parts: list[nn.Module] = []
    for number in range(layers - 1):
        parts += [nn.Linear(7 if number == 0 else 9, 9), *([shared] if norm else [])]
        parts.append(nn.ReLU() if act == "relu" else nn.GELU())
    last = nn.Linear(9 if parts else 7, 5)
    head = nn.Module()
    head.mlp = nn.Sequential(*parts, last) if parts else last
    head.last_layer = nn.Module()
    head.last_layer.weight_g = nn.Parameter(torch.rand(out, 1) + 0.5)
    head.last_layer.weight_v = nn.Parameter(torch.randn(out, 5))
    return head


HEADS = {
    "one layer": (1, None, "gelu"),
    "four": (4, None, "relu"),
    "four with a norm": (4, "ln", "relu"),
    "two with a batch norm": (2, "bn", "gelu"),
}


@pytest.mark.parametrize(("layers", "norm", "act"), HEADS.values(), ids=HEADS)
def test_heads_of_other_layers(layers, norm, act, tmp_path):
    """The recording is made with plain PyTorch."""
    head, tokens = released_head(layers, norm, act, 11), torch.randn(3, 5, 7, requires_grad=True)
    weights = {f"weight.{name}": value.clone() for name, value in head.state_dict().items()}
    last, directions = head.last_layer, F.normalize(head.last_layer.weight_v, dim=1) * head.last_layer.weight_g
    logits = F.normalize(head.mlp(tokens.flatten(0, 1)).unflatten(0, (3, 5)), dim=-1) @ directions.T
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    case = Case(path_of("ibot_head_shared"))
    case.config = {
        "in_dim": 7,
        "hidden_dim": 9,
        "bottleneck_dim": 5,
        "out_dim": 11,
        "nlayers": layers,
        "norm": norm,
        "act": act,
        "norm_last_layer": False,
        "shared_head": True,
    }
    gradients = {f"grad.weight.{name}": parameter.grad for name, parameter in head.named_parameters()}
    others = {
        "input.tokens": tokens,
        "grad.input.tokens": tokens.grad,
        "output.cls": logits[:, 0],
        "output.patch": logits[:, 1:],
        "input.grad_output.cls": upstream[:, 0],
        "input.grad_output.patch": upstream[:, 1:],
    }
    case.tensors = weights | gradients | others
    assert last.weight_g.grad.any()
    path = write(case, tmp_path)
    run(Case(path))
    assert_a_changed_value_fails(path, "output.patch")
    case = Case(path)
    case.config["act"] = "relu" if act == "gelu" else "gelu"
    if layers > 1:
        with pytest.raises(AssertionError):
            run(case)


UNSUPPORTED = {
    "norm": ("ibot_head_ln", {"norm": "csyncbn"}),
    "BatchNorm": ("ibot_head_ln", {"norm": "bn"}),
    "activation": ("ibot_head_ln", {"act": "silu"}),
    "last_norm": ("ibot_head_ln", {"last_norm": "bn"}),
    "bottleneck": ("ibot_head_ln", {"bottleneck_dim": 0}),
    "layernorm_eps": ("dino_vit_32x32", {"layernorm_eps": 1e-5}),
    "teacher": ("ibot_train_step_shared", {"shared_head_teacher": False}),
    "mlp_ratio": ("selfpatch_train_step_k4", {"mlp_ratio": 2}),
    "qkv_bias": ("selfpatch_ca_block", {"qkv_bias": False}),
    "drop_path": ("dino_train_step", {"drop_path": 0.1}),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_an_unsupported_option_skips_the_case(what):
    name, other = UNSUPPORTED[what]
    case = Case(path_of(name))
    case.config |= other
    with pytest.raises(pytest.skip.Exception, match="not covered: .*" + what.split("_")[0]):
        run(case)


def batch_norm_with_an_error(self: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Its backward leaves out a thousandth of the gradient through the mean."""
    mean, var = x.mean(dim=0), x.var(dim=0, correction=0)
    mean = mean - 1e-3 * (mean - mean.detach())
    z = (x - mean) / (var + self.eps).sqrt()
    return z if self.weight is None else z * self.weight + self.bias


def softmax_with_an_error(self: Tensor, dim: int) -> Tensor:
    """Its backward leaves out a thousandth of the gradient through the normalization."""
    total = self.logsumexp(dim=dim, keepdim=True)
    return (self - total + 1e-3 * (total - total.detach())).exp()


BIASES_BEFORE_A_NORM = {
    "moby_head_2layer_a": ["grad.linear_hidden.1.bias"],
    "moby_head_3layer_b": ["grad.linear_hidden.1.bias", "grad.linear_hidden.4.bias"],
    "dino_head_bn": ["grad.weight.mlp.0.bias", "grad.weight.mlp.3.bias"],
    "moby_step_a": [
        f"step{step}.grad.{bias}.bias"
        for step in (0, 3)
        for bias in ("projector.linear_hidden.1", "projector.linear_out", "predictor.linear_hidden.1")
    ],
}
KEY_BIASES = {
    "selfpatch_ca_block": ["grad.weight.attn.k.bias"],
    "selfpatch_head_loc_false_14x14": [f"grad.weight.cls_blocks.{block}.attn.k.bias" for block in (0, 1)],
    "selfpatch_head_loc_false_6x6": [f"grad.weight.cls_blocks.{block}.attn.k.bias" for block in (0, 1)],
    "selfpatch_heads_loss_k1248": [f"grad.weight.student.k4.ca_head.cls_blocks.{b}.attn.k.bias" for b in (0, 1)],
}


@pytest.mark.parametrize("name", [*BIASES_BEFORE_A_NORM, *KEY_BIASES])
def test_a_missing_thousandth_of_a_canceling_term_fails(name):
    """Each gradient that exact arithmetic makes zero differs when a thousandth of a term that cancels is missing."""
    case = Collector(path_of(name))
    with (
        mock.patch.object(nn.BatchNorm1d, "forward", batch_norm_with_an_error),
        mock.patch.object(Tensor, "softmax", softmax_with_an_error),
    ):
        run(case)
    assert set((BIASES_BEFORE_A_NORM | KEY_BIASES)[name]) <= case.differing


@pytest.mark.parametrize("name", ["pqcl_official_attention_b", "pqcl_derived_attention_rawonly_a"])
def test_a_missing_thousandth_of_a_canceling_term_fails_in_query_attention(name):
    """The error is put into the recording, as the op computes its own backward."""
    case = Case(path_of(name))
    heads, raw, bias = int(case.meta["num_heads"]), case["x"].shape[1], case["weight.qkv.bias"].requires_grad_()
    qkv = F.linear(torch.cat([case["x"], case["y"]], dim=1), case["weight.qkv.weight"], bias)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    is_raw = torch.arange(q.shape[2]) < raw
    visible = is_raw | (~is_raw[:, None] if "official" in name else is_raw)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    with_error, exact = (
        torch.autograd.grad(
            F.linear((p @ v).transpose(1, 2).flatten(2), case["weight.proj.weight"], case["weight.proj.bias"]),
            bias,
            torch.cat([case["cotangent_x"], case["cotangent_y"]], dim=1),
            retain_graph=True,
        )[0]
        for p in (softmax_with_an_error(scores, -1), scores.softmax(-1))
    )
    key_bias = case["grad.qkv.bias"].chunk(3)[1]
    key_bias += (with_error - exact).chunk(3)[1]
    bias.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"grad\.qkv\.bias"):
        run(case)
