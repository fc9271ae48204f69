"""MoCo v3 and MoBY against the recorded released ones: heads, losses, schedules, positions, whole steps."""

import json
import re

import torch
from harness import Case, check, skip_unsupported
from objective_cases import (
    moco_loss_and_gradient,
    moco_on_a_rank,
    now_of,
    one_direction,
    recorded_in_processes,
    views_of,
)
from rounding import RoundingBounds
from torch import Tensor, nn

from patchlight.backbones.vit import VisionTransformer
from patchlight.engine.branches import Student, Teacher
from patchlight.engine.schedules import cosine
from patchlight.heads.contrast import ContrastHead
from patchlight.heads.summary import ClassTokenSummary
from patchlight.objectives.contrast import unit_rows
from patchlight.objectives.interface import Objective
from patchlight.objectives.moby import Moby, MobyOptions
from patchlight.objectives.moco_v3 import MocoV3, MocoV3Options
from patchlight.objectives.weighted import WeightedObjectives
from patchlight.records import Crops, Cues, Tokens, Views

FORWARD, LOSS, GRADIENT = 2e-5, 1e-5, 5e-4


def our_name(recorded: str, layers: int) -> str:
    """Within a head: MoCo v3 numbers its modules as we do; MoBY has an unused first module and another name for the last."""
    if recorded[0].isdigit():
        return f"mlp.{recorded}"
    recorded = re.sub(r"linear_hidden\.(\d+)", lambda found: f"mlp.{int(found[1]) - 1}", recorded)
    return recorded.replace("linear_out", f"mlp.{3 * (layers - 1)}")


def matrices(weights: dict[str, Tensor]) -> list[Tensor]:
    """The linear layers of a recorded head, in their order: its numbered ones, then MoBY's last."""
    names = [name for name, value in weights.items() if value.ndim == 2]
    return [weights[name] for name in sorted(names, key=lambda n: int(re.sub(r"\D", "", n) or 10**6))]


@check("mocov3_mlp", "moby_head")
def contrast_head(case: Case) -> None:
    layers = int(case.meta["num_layers"])
    weights = {our_name(name, layers): value for name, value in case.under("weight.").items()}
    head = ContrastHead(
        case["x"].shape[1],
        hidden=len(weights["mlp.0.weight"]),
        out=case["y"].shape[1],
        layers=layers,
        bias="mlp.0.bias" in weights,
        last_norm=case.meta.get("last_bn") == "true",
    )
    head.load_state_dict(weights, strict=True)
    bounds = RoundingBounds(head)
    x = case["x"].clone().requires_grad_()
    y = head(x.unsqueeze(0))[0]
    case.close("y", y, rel=FORWARD)
    y.backward(case["cotangent"])
    case.close("grad_x", x.grad, rel=FORWARD)
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    recorded = {our_name(name, layers): f"grad.{name}" for name in case.under("grad.")}
    assert gradients.keys() == recorded.keys()
    for name, key in recorded.items():
        compare(case, key, gradients[name], FORWARD, bounds.get(name))
    for name in case.under("after."):
        ours = our_name(name, layers)
        case.close(f"after.{name}", head.state_dict()[ours], rel=FORWARD, floor=bounds.get(ours, 0.0))


def compare(case: Case, key: str, gradient: Tensor, rel: float, bound: Tensor | None) -> None:
    """Within rel; a gradient that exact arithmetic makes zero within the bound of its rounding alone."""
    case.close(key, gradient, rel=rel if bound is None else 0.0, floor=0.0 if bound is None else bound)


@check("mocov3_loss")
def moco_loss(case: Case) -> None:
    loss, gradient = moco_loss_and_gradient(case["q"], case["k"], float(case.meta["T"]))
    case.close("loss", loss, rel=LOSS)
    case.close("grad_q", gradient, rel=FORWARD)


@check("mocov3_loss_2rank")
def moco_loss_on_ranks(case: Case) -> None:
    losses, gradients = zip(*recorded_in_processes(case, moco_on_a_rank), strict=True)
    case.close("loss", torch.stack(losses), rel=LOSS)
    case.close("grad_q", torch.stack(gradients), rel=FORWARD)


@check("moby_loss")
def moby_loss(case: Case) -> None:
    width, length = case["queue"].shape
    objective = Moby(MobyOptions(queue=length, out=width, temperature=float(case.meta["T"])))
    objective.queue.copy_(case["queue"].T)
    normalize = {"q": lambda x: x, "q_unnormalized": unit_rows}
    assert any(name in case for name in normalize)
    for name in filter(case.__contains__, normalize):
        q = case[name].clone().requires_grad_()
        loss = one_direction(objective, normalize[name](q), case["k"])
        loss.backward()
        case.close("loss", loss, rel=LOSS)
        case.close(f"grad_{name}", q.grad, rel=FORWARD)


@check("moby_schedule")
def moby_schedule(case: Case) -> None:
    total, base = int(case.meta["K"]), float(case.meta["contrast_momentum"])
    momentum = [cosine(step, total, base, 1.0) for step in range(total + 1)]
    case.close("momentum", torch.tensor(momentum, dtype=torch.float64), rel=0.0, floor=1e-12)


@check("mocov3_schedule")
def moco_schedule(case: Case) -> None:
    per_epoch, epochs, warmup = (int(case.meta[key]) for key in ("iters_per_epoch", "epochs", "warmup_epochs"))
    total, peak = per_epoch * epochs, float(case.meta["lr_after_linear_scaling"])
    momentum = [cosine(step, total, float(case.meta["moco_m"]), 1.0) for step in range(total)]
    lr = [cosine(step, total, peak, 0.0, warmup * per_epoch, ends="next") for step in range(total)]
    case.close("momentum", torch.tensor(momentum, dtype=torch.float64), rel=0.0, floor=1e-12)
    case.close("lr", torch.tensor(lr, dtype=torch.float64), rel=0.0, floor=1e-12)


@check("mocov3_posembed")
def moco_positions(case: Case) -> None:
    side, width = int(case.meta["grid_h"]), int(case.meta["dim"])
    if side != int(case.meta["grid_w"]):
        skip_unsupported("a table of positions for an image that is not square")
    vit = VisionTransformer(width, depth=1, heads=1, patch_size=1, image_size=side, positions="sincos_rows_first")
    case.close("pos_embed", vit.pos_embed, rel=0.0, floor=1e-6)
    assert not vit.pos_embed.requires_grad


class Vectors(nn.Module):
    """The recorded encoder, Linear and GELU, as a backbone whose images are vectors."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(width, out), nn.GELU()

    def forward(self, pixels: Tensor, mask: None) -> Tokens:
        x = self.act(self.fc(pixels))
        return Tokens(x, x.unsqueeze(1), (1, 1))


class RecordedSteps:
    """Both branches with the recorded encoder, the recorded steps, and the recorded SGD between them.

    names: prefixes of recorded names, and ours, which begin with the name of the branch.
    """

    def __init__(self, case: Case, objective: Objective, encoder: str, names: dict[str, str]) -> None:
        self.case, self.objective, self.names, self.compared = case, objective, names, 0
        out, width = case[f"weight.{encoder}.weight"].shape
        head, predictor = objective.head(out), objective.predictor(out)
        self.student = Student(
            Vectors(width, out), ClassTokenSummary(), {objective.name: head}, {objective.name: predictor}
        )
        teacher_heads = {objective.name: objective.head(out)}
        self.teacher = Teacher(Vectors(width, out), ClassTokenSummary(), teacher_heads).requires_grad_(False)
        self.objectives = WeightedObjectives([objective])
        weights = {name: value for name, value in case.under("weight.").items() if not name.startswith("queue")}
        for branch in (self.student, self.teacher):
            ours = {self.locate(name)[1]: value for name, value in weights.items() if self.locate(name)[0] is branch}
            state = branch.load_state_dict(ours, strict=False)
            assert not state.unexpected_keys
            assert all("running" in key or "tracked" in key for key in state.missing_keys)
        last = max(number for number, part in enumerate(head.mlp) if isinstance(part, nn.Linear))
        into_predictor = {f"heads.{objective.name}.mlp.{last}": f"predictors.{objective.name}.mlp.0"}
        self.bounds = {
            self.student: RoundingBounds(self.student, into_predictor),
            self.teacher: RoundingBounds(self.teacher),
        }

    def locate(self, recorded: str) -> tuple[nn.Module, str]:
        """The branch of a recorded tensor, and its name there."""
        prefix = next(old for old in self.names if recorded.startswith(old))
        branch, _, path = self.names[prefix].partition(".")
        rest = recorded.removeprefix(prefix)
        if "backbone" in path:
            return getattr(self, branch), path + rest
        return getattr(self, branch), path + our_name(rest, len(matrices(self.case.under(f"weight.{prefix}"))))

    def run_step(self, number: int) -> None:
        """A step: the loss, the gradients that are recorded, then SGD."""
        case, now = self.case, now_of(self.objectives)
        pixels = torch.stack(list(case.numbered(f"step{number}.x")))
        shape = views_of(pixels.shape[1], len(pixels))
        views = Views(Crops(pixels, shape.global_crops.box, shape.global_crops.flip), None, None, shape.ids)
        with torch.no_grad():
            teacher = self.teacher.sides(self.teacher(views))
        loss, _ = self.objectives(self.student.sides(self.student(views)), teacher, views, Cues(), now)
        case.close(f"step{number}.loss", loss, rel=LOSS)
        loss.backward()
        parameters = dict(self.student.named_parameters())
        bounds = self.bounds[self.student]
        for recorded in case.under(f"step{number}.grad."):
            _, ours = self.locate(recorded)
            compare(case, f"step{number}.grad.{recorded}", parameters[ours].grad, GRADIENT, bounds.get(ours))
            self.compared += 1
        bounds.clear_gradients()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= float(case.meta["sgd_lr_between_steps"]) * parameter.grad
                parameter.grad = None
        self.objectives.after_step()
        self.compare(f"step{number}.after.")

    def compare(self, prefix: str) -> None:
        """Everything recorded under the prefix against ours."""
        for recorded in self.case.under(prefix):
            branch, ours = self.locate(recorded)
            floor = self.bounds[branch].get(ours, 0.0) if ours.endswith("running_mean") else 0.0
            self.case.close(prefix + recorded, branch.state_dict()[ours], rel=FORWARD, floor=floor)
            self.compared += 1

    def compare_final(self) -> None:
        self.compare("final.")
        assert self.compared, f"{self.case.name}: no gradient and no weight is recorded"


@check("mocov3_step")
def moco_steps(case: Case) -> None:
    names = {
        "base_encoder.trunk.": "student.backbone.fc.",
        "base_encoder.head.": "student.heads.moco_v3.",
        "predictor.": "student.predictors.moco_v3.",
        "momentum_encoder.trunk.": "teacher.backbone.fc.",
        "momentum_encoder.head.": "teacher.heads.moco_v3.",
    }
    head, predictor = (matrices(case.under(f"weight.{part}.")) for part in ("base_encoder.head", "predictor"))
    norms = [name for name in case.under("final.predictor.") if name.endswith("running_mean")]
    options = MocoV3Options(
        float(case.meta["T"]),
        hidden=len(head[0]),
        out=len(head[-1]),
        layers=len(head),
        predictor_layers=len(predictor),
        predictor_last_norm=len(norms) == len(predictor),
    )
    steps = RecordedSteps(case, MocoV3(options), "base_encoder.trunk", names)
    for number, momentum in enumerate(json.loads(case.meta["momentum"])):
        steps.teacher.follow(steps.student, momentum)  # the released code moves the teacher at the start of a step
        steps.run_step(number)
    steps.compare_final()


@check("moby_step")
def moby_steps(case: Case) -> None:
    """Queues and pointer are recorded as a step leaves them."""
    names = {
        "encoder.": "student.backbone.",
        "projector.": "student.heads.moby.",
        "predictor.": "student.predictors.moby.",
        "encoder_k.": "teacher.backbone.",
        "projector_k.": "teacher.heads.moby.",
    }
    head, predictor = (matrices(case.under(f"weight.{part}.")) for part in ("projector", "predictor"))
    queues = torch.stack([queue.T for queue in case.numbered("weight.queue")])
    objective = Moby(
        MobyOptions(
            queue=queues.shape[1],
            temperature=float(case.meta["T"]),
            hidden=len(head[0]),
            out=len(head[-1]),
            layers=len(head),
            predictor_layers=len(predictor),
        )
    )
    steps = RecordedSteps(case, objective, "encoder.fc", names)
    objective.queue.copy_(queues)
    total, base = int(case["total_iters_K"]), float(case.meta["contrast_momentum"])
    for number in range(case.step_count()):
        steps.teacher.follow(steps.student, cosine(number, total, base, 1.0))
        steps.run_step(number)
        for view in range(len(queues)):
            case.close(f"step{number}.queue{view + 1}", objective.queue[view].T, rel=FORWARD)
        case.equal(f"step{number}.queue_ptr", objective.oldest[None])
    steps.compare_final()
