"""PQCL: position tables, relative positions, the block with two streams, the losses and whole steps, as recorded."""

from functools import partial

import objective_cases as cases
import torch
from harness import Case, check, linear_layers, renamed
from timm.layers import LayerNorm
from torch import Tensor

from patchlight.backbones.positions import grid_positions, sincos, sincos_printed
from patchlight.backbones.vit import Block, VisionTransformer
from patchlight.data.policy import pqcl_policy
from patchlight.engine.assembly import build_branches, build_objectives
from patchlight.objectives.geometry import relative_positions
from patchlight.objectives.ibot import Ibot, IbotOptions
from patchlight.objectives.pqcl import Pqcl, PqclOptions
from patchlight.records import Crops, Cues, Features, Now, Side, Views, now_at
from patchlight.run import Data, Model, Objectives, Run

OUR_NAMES = {
    r"backbone\.masked_embed": "backbone.mask_token",
    r"head\.last_layer\.": "heads.ibot.prototypes.",
    r"head\.mlp\.(?=weight|bias)": "heads.ibot.mlp.0.",  # a head with a single layer has no list of layers there
    r"head\.": "heads.ibot.",
}


def boxes(rect: Tensor, flip: Tensor | None = None, pixels: Tensor | None = None) -> Crops:
    """Crops from recorded rectangles [V, B, 4]: top, left, height, width."""
    flip = torch.zeros(rect.shape[:2]) if flip is None else flip
    return Crops(pixels, rect[..., [1, 0, 3, 2]].double(), flip > 0)


@check("pqcl_official_sincos")
def position_tables(case: Case) -> None:
    tables = case.under("global_d")
    assert tables
    for name in tables:
        width, side = (int(number) for number in name.split("_n"))
        vit = VisionTransformer(width, depth=1, heads=1, patch_size=2, image_size=2 * side, positions="sincos")
        case.close(f"global_d{name}", vit.pos_embed[0], rel=0, floor=1e-5)
    for number, row in enumerate(case["local_params_d_n_wbias_wscale_hbias_hscale"]):
        width, side, x, x_scale, y, y_scale = row.tolist()
        positions = grid_positions((int(side),) * 2) * row.new_tensor([x_scale, y_scale]) + row.new_tensor([x, y])
        case.close(f"local{number}", sincos(positions, int(width)), rel=0, floor=1e-5)


def positions_of(case: Case, flips: Tensor, **options) -> Tensor:
    """[cases, Q, 2] of as many pairs of a global and a query crop."""
    grids = [(int(case.meta[name]),) * 2 for name in ("query_grid", "global_grid")]
    crops, queries = (
        boxes(case[f"rect_{kind}"][None], flips[None, :, n]) for n, kind in enumerate(("global", "query"))
    )
    return relative_positions(queries, crops, *grids, **options)[0]


@check("pqcl_official_relpos")
def released_positions(case: Case) -> None:
    """The released code ignores the flips of crops, so any flips give its result."""
    flips = torch.randint(2, (len(case["rect_global"]), 2))
    positions = positions_of(case, flips, flip_aware=False)
    case.close("pos_embed", sincos(positions, case["pos_embed"].shape[-1]), rel=0, floor=5e-5)


@check("pqcl_derived_relpos")
def positions_under_flips(case: Case) -> None:
    width = case["global_table"].shape[-1]
    anchors = {"top_left": "corner", "centre": "center"}
    for recorded in case.under("coord_xy_"):
        anchor = anchors[recorded]
        positions = positions_of(case, case["flip_global_query"], anchor=anchor)
        shape = case[f"coord_xy_{recorded}"].shape
        case.close(f"coord_xy_{recorded}", positions.view(shape), rel=0, floor=1e-9)
        case.close(f"pos_embed_{recorded}", sincos(positions, width), rel=0, floor=1e-5)
    grid = grid_positions((int(case.meta["global_grid"]),) * 2)
    case.close("global_table", sincos(grid, width), rel=0, floor=1e-5)
    case.close("global_table_literal_eq4", sincos_printed(grid, width), rel=0, floor=1e-5)


@check("pqcl_official_block")
def block_with_two_streams(case: Case) -> None:
    width, hidden = case["weight.mlp.fc2.weight"].shape
    norm = partial(LayerNorm, eps=float(case.meta.get("layernorm_eps", 1e-5)))  # 1e-5 according to the folder's README
    bias = "weight.attn.qkv.bias" in case
    block = Block(width, int(case.meta["num_heads"]), (hidden + 0.5) / width, qkv_bias=bias, norm_layer=norm)
    block.load_state_dict(case.under("weight."), strict=True)
    streams = [case[name].clone().requires_grad_() for name in "xy"]
    raw = streams[0].shape[1]
    out = block(torch.cat(streams, dim=1), raw)
    out.backward(torch.cat([case["cotangent_x"], case["cotangent_y"]], dim=1))
    for name, stream, part in zip("xy", streams, (out[:, :raw], out[:, raw:]), strict=True):
        case.close(f"out_{name}", part, rel=2e-5)
        case.close(f"grad_{name}", stream.grad, rel=2e-5)
    recorded = case.under("grad.")
    assert set(recorded) == {name for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        case.close(f"grad.{name}", parameter.grad, rel=2e-5)


@check("pqcl_official_loss")
def losses(case: Case) -> None:
    """Recorded logits in place of features, as in `objective_cases`."""
    count, momentum = case["student_query"].shape[-1], float(case.meta["center_momentum"])
    temperatures = case["teacher_temps_cls_patch_query"].tolist()
    ibot = Ibot(
        cases.GivenMasks(masks_of(case, "mask")),
        IbotOptions(
            prototypes=count,
            bottleneck=count,
            student_temperature=float(case.meta["student_temp"]),
            teacher_temperature=temperatures[0],
            patch_teacher_temperature=temperatures[1],
            warmup_epochs=0,
            center_momentum=momentum,
            patch_center_momentum=momentum,
        ),
    )
    options = PqclOptions(teacher_temperature=temperatures[2], warmup_epochs=0, center_momentum=momentum)
    pqcl = Pqcl(ibot.options, options)
    targets = {"center": ibot.target, "center2": ibot.patch_target, "center3": pqcl.target}
    for name, target in targets.items():
        cases.start(target, case[f"{name}_before"])
    leaves = {name: case[f"student_{name}"].clone().requires_grad_() for name in ("global", "query")}
    batch, head = len(case["teacher_query"]), cases.LogitsHead(count, count)
    student = Side(features(leaves["global"], batch, leaves["query"]), head=head)
    number = int(case.meta["query_crops"])
    query = case["teacher_query"].unflatten(1, (number, -1)).transpose(0, 1)  # [L, B, n, K]
    teacher = Side(
        features(case["teacher_global"], batch), query_crops=Features(query[:, :, 0], query, (0, 0)), head=head
    )
    views, now = cases.views_of(batch, len(ibot.masks.mask)), now_of_both(ibot, pqcl)
    cues = ibot.cue(views, student.global_crops.grid, now)
    terms = ibot(student, teacher, views, cues, now) | pqcl(student, teacher, views, cues, now)
    loss = check_terms(case, terms, [float(case.meta[f"lambda{n}"]) for n in (1, 2, 3)])
    loss.backward()
    for name, leaf in leaves.items():
        case.close(f"grad_student_{name}", leaf.grad, rel=1e-5)
    for objective in (ibot, pqcl):
        objective.after_step()
    for name, target in targets.items():
        case.close(f"{name}_after", target.center.view_as(case[f"{name}_after"]), rel=1e-5)


def now_of_both(ibot: Ibot, pqcl: Pqcl) -> Now:
    clock = cases.clock_of(0)
    return now_at(clock, ibot.schedule(clock) | pqcl.schedule(clock))


def masks_of(case: Case, prefix: str) -> Tensor:
    """[V, B, N] bool."""
    return torch.stack(list(case.numbered(prefix))).flatten(2) > 0


def features(logits: Tensor, batch: int, queries: Tensor | None = None) -> Features:
    """[2B, 1 + N, K] of both views, and [2B, Q, K] of their queries."""
    by_crop = cases.by_crop(logits, batch)
    queries = None if queries is None else cases.by_crop(queries, batch)
    grid = cases.square(by_crop.shape[2] - 1)
    return Features(by_crop[:, :, 0], by_crop[:, :, 1:], grid, queries=queries)


def check_terms(case: Case, terms: dict[str, Tensor], weights: list[float]) -> Tensor:
    """Compares each term and the weighted sum, which is returned. Terms are recorded with their weights."""
    recorded = ("loss_cls", "loss_patch", "loss_query")
    weighted = [w * terms[name] for w, name in zip(weights, ("ibot/cls", "ibot/patch", "pqcl/query"), strict=True)]
    for key, term in zip(recorded, weighted, strict=True):
        case.close(key, term, rel=1e-5)
    case.close("loss", sum(weighted), rel=1e-5)
    return sum(weighted)


def recorded_run(case: Case) -> Run:
    """A run of the recorded sizes; of its crops only number and sizes matter."""
    case.skip_unless(drop_path=0, layernorm_eps=1e-6, centers_before="zeros")
    meta, weights = case.meta, case.under("student.")
    count, bottleneck = weights["head.last_layer.weight_v"].shape
    temperature, momentum = float(meta["teacher_temp_epoch1"]), float(meta.get("center_momentum", 0.9))  # as released
    size, query = case["image_global_0"].shape[-1], case["image_query_0"].shape[-1]
    ibot = IbotOptions(
        prototypes=count,
        bottleneck=bottleneck,
        hidden=len(weights.get("head.mlp.0.weight", weights["head.last_layer.weight_v"])),  # one layer: not used
        layers=linear_layers(weights, "head.mlp."),
        student_temperature=float(meta["student_temp"]),
        teacher_temperature=temperature,
        patch_teacher_temperature=temperature,
        warmup_epochs=0,
        center_momentum=momentum,
        patch_center_momentum=momentum,
    )
    pqcl = PqclOptions(flip_aware=False, teacher_temperature=temperature, warmup_epochs=0, center_momentum=momentum)
    sizes = {
        "width": weights["backbone.norm.weight"].numel(),
        "depth": int(meta["depth"]),
        "heads": int(meta["num_heads"]),
        "mlp_ratio": float(meta["mlp_ratio"]),
        "qkv_bias": "backbone.blocks.0.attn.qkv.bias" in weights,
    }
    patch = int(meta["patch_size"])
    return Run(
        model=Model(patch_size=patch, image_size=size, drop_path=0.0, positions="sincos", sizes=sizes),
        objectives=Objectives((ibot, pqcl)),
        data=Data(loader="procedural", crops=pqcl_policy(len(case["rect_query"]), query, global_size=size)),
    )


def load(branch: torch.nn.Module, recorded: dict[str, Tensor]) -> None:
    """Loads the recorded weights under our names; for the teacher no mask token is recorded, and none is needed."""
    ours = renamed(recorded, OUR_NAMES)
    ours.setdefault("backbone.mask_token", branch.backbone.mask_token.detach())
    torch.testing.assert_close(ours["backbone.pos_embed"], branch.backbone.pos_embed, rtol=0, atol=1e-5)
    branch.load_state_dict(ours, strict=True)


@check("pqcl_official_step")
def whole_step(case: Case) -> None:
    run = recorded_run(case)
    objectives = build_objectives(run)
    student, teacher = build_branches(run.model, objectives.objectives())
    load(student, case.under("student."))
    load(teacher, case.under("teacher."))
    ibot, pqcl = objectives.objectives()
    ibot.masks = cases.GivenMasks(masks_of(case, "mask_"))
    pixels, query_pixels = (torch.stack(list(case.numbered(f"image_{kind}_"))) for kind in ("global", "query"))
    flip = torch.randint(2, pixels.shape[:2])  # ignored, as in the released code
    crops, queries = boxes(case["rect_global"], flip, pixels), boxes(case["rect_query"], pixels=query_pixels)
    views = Views(crops, None, queries, torch.arange(pixels.shape[1]))
    now = cases.now_of(objectives)
    with torch.no_grad():
        teacher_features = teacher(views, wanted=objectives.teacher_wants)
    cues = objectives.cue(views, teacher_features.global_crops.grid, now)
    check_cues(case, student, cues, teacher_features.query_crops.grid)
    student_features = student(views, cues)
    check_logits(case, "student_global_logits", student.heads["ibot"], tokens_of(student_features.global_crops))
    check_logits(
        case, "student_query_logits", student.heads["ibot"], student_features.global_crops.queries.flatten(0, 1)
    )
    check_logits(case, "teacher_global_logits", teacher.heads["ibot"], tokens_of(teacher_features.global_crops))
    by_image = teacher_features.query_crops.patches.transpose(0, 1).flatten(1, 2)
    check_logits(case, "teacher_query_logits", teacher.heads["ibot"], by_image)
    loss, terms = objectives(student.sides(student_features), teacher.sides(teacher_features), views, cues, now)
    check_terms(case, terms, [float(case.meta.get(f"lambda{n}", 1.0)) for n in (1, 2, 3)])  # 1 as released
    loss.backward()
    objectives.after_step()
    for name, target in (("center", ibot.target), ("center2", ibot.patch_target), ("center3", pqcl.target)):
        case.close(name, target.center.view_as(case[name]), rel=1e-5)
    recorded = renamed({name: name for name in case.under("grad.")}, OUR_NAMES)
    ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert set(ours) == set(recorded)
    for name, gradient in ours.items():
        case.close(f"grad.{recorded[name]}", gradient, rel=5e-4)


def tokens_of(features: Features) -> Tensor:
    """[V * B, 1 + N, D] class token and patches."""
    return torch.cat([features.summary.unsqueeze(2), features.patches], dim=2).flatten(0, 1)


def check_logits(case: Case, key: str, head: torch.nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        case.close(key, head.prototypes.logits(head(x)), rel=5e-5)


def check_cues(case: Case, student: torch.nn.Module, cues: Cues, query_grid: tuple[int, int]) -> None:
    """Query positions per view and crop, and the position table that the teacher's query crops get."""
    backbone, crops = student.backbone, len(case["rect_query"])
    embedded = sincos(cues.queries.positions, backbone.width).unflatten(2, (crops, -1))  # [V, B, L, n, D]
    for view in range(len(embedded)):
        for crop in range(crops):
            case.close(f"query_pos_view{view}_crop{crop}", embedded[view, :, crop], rel=0, floor=5e-5)
    case.close("teacher_query_pos_embed", backbone.positions(query_grid), rel=1e-5)
