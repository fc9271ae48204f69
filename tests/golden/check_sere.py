"""SERE's grids, sampling, heads and whole steps against the recorded ones of the released code."""

import torch
from harness import Case, check, parse_value
from objective_cases import now_of, square
from torch import Tensor, nn

from patchlight.heads.relation import RelationHead, RelationPrediction, RelationPredictor
from patchlight.objectives.geometry import (
    SamplingMatrices,
    bilinear_weights,
    overlap,
    sample_patches,
    sample_points,
)
from patchlight.objectives.sere import Sere, SereOptions
from patchlight.records import Crops, Cues, Features, Side, Views

REL, STEP_LOSS, STEP_GRADIENT = 2e-5, 1e-5, 1e-4


@check("sere_grid")
def grids(case: Case) -> None:
    """The recorded points are [x, y] on a scale from -1 to 1, rows of equal y."""
    box = {side: case[f"rect_{side}"][:, :4].float() for side in "qk"}
    shared = overlap(box["q"], box["k"])
    for side in "qk":
        for count in case["sizes"].tolist():
            at = sample_points(shared, box[side], case[f"rect_{side}"][:, 4] > 0, count)
            x, y = at.x[:, None, :].expand(-1, count, -1), at.y[:, :, None].expand(-1, -1, count)
            case.close(f"grid_{side}_{count}", 2 * torch.stack([x, y], dim=-1) - 1, rel=0.0, floor=1e-6)


def matrices_of(grid: Tensor, cells: tuple[int, int]) -> SamplingMatrices:
    """From recorded points [B, S, S, 2]."""
    x, y = (grid[:, 0, :, 0] + 1) / 2, (grid[:, :, 0, 1] + 1) / 2
    return SamplingMatrices(bilinear_weights(y, cells[0]).unsqueeze(1), bilinear_weights(x, cells[1]).unsqueeze(1))


def sampled_twice(relation: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """A relation [B, M, N, N], its rows sampled at points Q, its columns at points K: [B, M, Q, K]."""
    grid = square(relation.shape[-1])
    for points in (queries, keys):  # sample the third dimension, then turn
        rows = relation.permute(0, 2, 1, 3)
        rows = sample_patches(rows.flatten(2), grid, matrices_of(points, grid)).squeeze(1)
        relation = rows.unflatten(2, (relation.shape[1], -1)).permute(0, 2, 3, 1)
    return relation


@check("sere_sampling", "sere_wrapper_sampling")
def sampling(case: Case) -> None:
    relation = case["relation"].requires_grad_()
    queries, keys = (case[name if name in case else "grid"] for name in ("grid1", "grid2"))
    out = sampled_twice(relation, queries, keys)
    out.backward(case["cotangent"])
    case.close("out", out, REL)
    case.close("grad_relation", relation.grad, REL)


def load(projection: nn.Module, prediction: nn.Module | None, weights: dict[str, Tensor]) -> None:
    """Recorded weights `projection.0.*`, `predictor.{0,1}.*`, of which the first is a 1 x 1 convolution."""
    for module, name in ((projection, "projection."), (prediction, "predictor.")):
        if module is not None:
            own = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
            own = {key: value.flatten(1) if value.ndim == 4 else value for key, value in own.items()}
            module.load_state_dict(own, strict=any("running" in key for key in own))


@check("sere_pixel_head", "sere_channel_head")
def heads(case: Case) -> None:
    kind = "spatial" if "pixel" in case.name else "channel"
    x = case["x"].requires_grad_()
    head, prediction = RelationHead(x.shape[-1]), RelationPrediction(x.shape[-1])
    parts = {"projection": getattr(head, kind), "predictor": getattr(prediction, kind)}
    load(*parts.values(), case.under("weight."))
    z = head(x.unsqueeze(0))
    p = prediction(z)
    relations = [relation_of(getattr(part, kind).squeeze(0), case, kind) for part in (z, p)]
    for name, relation in zip("zp", relations, strict=True):
        case.close(f"relation_{name}", relation, REL)
    torch.autograd.backward(relations, [case["cotangent_z"], case["cotangent_p"]])
    case.close("grad_x", x.grad, REL)
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            key = f"grad.{part}.{name}"
            case.close(key, parameter.grad.view(case[key].shape), REL)
        for name, buffer in module.named_buffers():
            case.close(f"after.{part}.{name}", buffer, REL)


def relation_of(features: Tensor, case: Case, kind: str) -> Tensor:
    if kind == "channel":
        scaled = features / int(case.meta["size"])
        return scaled.transpose(1, 2) @ scaled
    by_head = features.unflatten(-1, (int(case.meta["num_heads"]), -1)).transpose(1, 2)
    return by_head @ by_head.transpose(2, 3) / by_head.shape[-1] ** 0.5


class RecordedSere(Sere):
    """Divides by the recorded sides; the released code uses them for every grid."""

    def __init__(self, case: Case) -> None:
        values = {name: parse_value(value) for name, value in case.meta.items()}
        recorded = {name: value for name, value in values.items() if isinstance(value, int | float)}
        options = SereOptions(
            teacher_spatial_temperature=recorded["temperature_pixel"],
            teacher_channel_temperature=recorded["temperature_channel"],
            global_points=int(recorded["overlap_size"]),
            local_points=int(recorded["local_overlap_size"]),
        )
        super().__init__(options, int(recorded["num_heads"]), local=recorded["n_local"] > 0)
        self.recorded = recorded
        self.sides: dict[tuple[int, int], float] = {}

    def side(self, grid: tuple[int, int]) -> float:
        return self.sides[grid]


@check("sere_step")
def steps(case: Case) -> None:
    """From recorded features to both losses and their gradients, through the objective itself."""
    objective = RecordedSere(case)
    locals_ = [f"x_student_local_{number}" for number in range(int(objective.recorded["n_local"]))]
    globals_ = [f"x_student_global_{number}" for number in range(len(case["rects_global"][0]))]
    leaves = {name: case[name].requires_grad_() for name in globals_ + locals_}
    width = leaves[globals_[0]].shape[-1]
    head, teacher_head = objective.head(width), objective.head(width).requires_grad_(False)
    predictor = RelationPredictor(width, asymmetric=True, local=bool(locals_))
    modules = {"student.pixel_sere": ("spatial", head, predictor.prediction)}
    modules["student.channel_sere"] = ("channel", head, predictor.prediction)
    if locals_:
        modules["student.pixel_sere_local"] = ("spatial", predictor.local_head, predictor.local_prediction)
        modules["student.channel_sere_local"] = ("channel", predictor.local_head, predictor.local_prediction)
    modules["teacher.pixel_sere"], modules["teacher.channel_sere"] = (
        ("spatial", teacher_head, None),
        ("channel", teacher_head, None),
    )
    parts = {
        name: (getattr(projection, kind), prediction and getattr(prediction, kind))
        for name, (kind, projection, prediction) in modules.items()
    }
    for name, pair in parts.items():
        load(*pair, case.under(f"{name}."))
    size = {"global": "channel_size_global", "local": "channel_size_local"}
    student = Side(
        features([leaves[name] for name in globals_]),
        features([leaves[name] for name in locals_]) if locals_ else None,
        head=head,
        predictor=predictor,
    )
    teacher = Side(features(list(case.numbered("x_teacher_global_"))), head=teacher_head)
    for crops, kind in ((student.global_crops, "global"), (student.local_crops, "local")):
        if crops is not None:
            objective.sides[crops.grid] = objective.recorded[size[kind]]
    local_crops = crops_of(case["rects_local"]) if locals_ else None
    views = Views(crops_of(case["rects_global"].transpose(0, 1)), local_crops, None, None)
    terms = objective(student, teacher, views, Cues(), now_of(objective))
    parameters = {
        f"{name}.{part}.{key}": parameter
        for name, pair in parts.items()
        if name.startswith("student")
        for part, module in zip(("projection", "predictor"), pair, strict=True)
        for key, parameter in module.named_parameters()
    }
    for ours, theirs in (("spatial", "pixel"), ("channel", "channel")):
        case.close(f"loss_{theirs}", terms[f"sere/{ours}"], STEP_LOSS)
        group = f"grad_{theirs}."
        inputs = leaves | parameters
        gradients = torch.autograd.grad(
            terms[f"sere/{ours}"], list(inputs.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(inputs, gradients, strict=True):
            if group + name not in case:
                assert gradient is None or not gradient.any(), f"{case.name} {group + name}: not recorded, not zero"
                continue
            case.close(group + name, gradient.view(case[group + name].shape), STEP_GRADIENT)


def features(views: list[Tensor]) -> Features:
    patches = torch.stack(views)
    return Features(patches[:, :, 0], torch.full_like(patches, torch.nan), square(patches.shape[2]), residual=patches)


def crops_of(rects: Tensor) -> Crops:
    """From recorded integers [V, B, 5]: x, y, w, h, flip."""
    return Crops(rects.new_zeros(*rects.shape[:2], 3, 1, 1), rects[..., :4].float(), rects[..., 4] > 0)
