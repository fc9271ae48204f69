"""DINO, iBOT and SelfPatch: losses, gradients, centers and masks against the recorded ones."""

import objective_cases as cases
import torch
from harness import HEAD_NAMES, SUMMARY_NAMES, Case, check, linear_layers, renamed, skip_unsupported, summary_depth
from rounding import RoundingBounds
from torch import nn

from patchlight.data.masking import MaskRule, ReleasedMasks, unpack_bits
from patchlight.heads.summary import ClassAttentionSummary
from patchlight.objectives.dino import Dino, DinoOptions
from patchlight.objectives.interface import NeighborRule
from patchlight.objectives.selfpatch import SelfPatch, SelfPatchOptions
from patchlight.objectives.weighted import WeightedObjectives
from patchlight.records import Cues, Features, Side, Tokens

FP32 = 1e-5
OUR_NAMES = SUMMARY_NAMES | HEAD_NAMES


def compare(case: Case, prefix: str, results: dict, rel: float = FP32) -> None:
    for key, value in results.items():
        case.close(prefix + key, value, rel)


def check_temperature(case: Case, key: str, value: float) -> None:
    if key in case:
        assert abs(case[key].item() - value) <= 1e-12, f"{case.name} {key}: {value}"


@check("dino_loss")
def dino_loss(case: Case) -> None:
    objective = Dino(cases.dino_options(case.config))
    cases.start(objective.target, case["step0.input.center"])
    for step, epoch in enumerate(case.config["epoch_of_step"]):
        prefix = f"step{step}."
        check_temperature(case, prefix + "input.teacher_temp", objective.temperature.at(cases.clock_of(epoch)))
        compare(case, prefix, cases.dino_step(case.under(prefix), objective, case.config["batch"], epoch))


@check("dino_loss_world2")
def dino_loss_in_two_processes(case: Case) -> None:
    compare_ranks(case, cases.recorded_in_processes(case, cases.dino_on_a_rank))


def compare_ranks(case: Case, results: list[dict]) -> None:
    """Values that are the same on all ranks are recorded once."""
    for rank, result in enumerate(results):
        for key, value in result.items():
            case.close(key if key in case else f"rank{rank}.{key}", value, FP32)


@check("ibot_loss")
def ibot_loss(case: Case) -> None:
    objective, config = cases.ibot_objective(case), case.config
    cases.start(objective.target, case["step0.input.center_cls"])
    cases.start(objective.patch_target, case["step0.input.center_patch"])
    for kind, temperature in (("temp", objective.temperature), ("patch_temp", objective.patch_temperature)):
        for epoch, recorded in enumerate(case.under("output.").get(f"teacher_{kind}_schedule", [])):
            assert abs(recorded - temperature.at(cases.clock_of(epoch))) <= 1e-12, f"teacher_{kind} of epoch {epoch}"
        for step, epoch in enumerate(config["epoch_of_step"]):
            check_temperature(case, f"step{step}.input.teacher_{kind}", temperature.at(cases.clock_of(epoch)))
    for step, epoch in enumerate(config["epoch_of_step"]):
        prefix = f"step{step}."
        compare(case, prefix, cases.ibot_step(case.under(prefix), objective, config, epoch))


@check("selfpatch_loss")
def selfpatch_loss(case: Case) -> None:
    objectives, config = cases.selfpatch_objectives(case.config), case.config
    cases.start(objectives[0].target, case["step0.input.center_cls"])
    cases.start(objectives[1].target, case["step0.input.center_patch"])
    for step, epoch in enumerate(config["epoch_of_step"]):
        prefix = f"step{step}."
        for objective in objectives:
            check_temperature(case, prefix + "input.teacher_temp", objective.temperature.at(cases.clock_of(epoch)))
        tensors = case.under(prefix)
        compare(case, prefix, cases.selfpatch_step(tensors, objectives, config["batch"], config["patch_weight"], epoch))


@check("selfpatch_loss_world2")
def selfpatch_loss_in_two_processes(case: Case) -> None:
    compare_ranks(case, cases.recorded_in_processes(case, cases.selfpatch_on_a_rank))


class Branch:
    """Summary head and both projection heads of a recorded branch, on recorded patches of its backbone."""

    def __init__(self, case: Case, name: str, objectives: tuple[Dino, SelfPatch]):
        config = case.config
        depth = summary_depth(case.under(f"weight.{name}."), "ca_head.")
        self.parts = {
            "ca_head": ClassAttentionSummary(config["dim"], config["num_heads"], depth, config["mlp_ratio"]),
            "c_head": objectives[0].head(config["dim"]),
            "p_head": objectives[1].head(config["dim"]),
        }
        for part, module in self.parts.items():
            module.load_state_dict(renamed(case.under(f"weight.{name}.{part}."), OUR_NAMES), strict=True)
        self.bounds = {part: RoundingBounds(module) for part, module in self.parts.items()}
        self.patches = {
            size: case[f"input.{name}_{size}"].clone().requires_grad_(name == "student")
            for size in ("global", "local")
            if f"input.{name}_{size}" in case
        }

    def features(self, rule: NeighborRule | None, batch: int) -> list[Features]:
        """Of global, then local crops."""
        result = []
        for x in self.patches.values():
            grid = cases.square(x.shape[1])
            output = self.parts["ca_head"](Tokens(None, x, grid), rule)
            parts = (output.summary, output.patches, output.aggregated)
            by_crop = [None if y is None else cases.by_crop(y, batch) for y in parts]
            result.append(Features(*by_crop[:2], grid, neighbors=by_crop[2]))
        return result


@check("selfpatch_heads_loss")
def selfpatch_from_patches_to_loss(case: Case) -> None:
    case.skip_unless(layernorm_eps=1e-6)
    for k in case.config["k"]:
        compare_neighborhood(case, k)


def compare_neighborhood(case: Case, k: int) -> None:
    objectives, batch = objectives_of(case, k), case.config["batch"]
    cases.start(objectives[0].target, case["input.center_cls"])
    cases.start(objectives[1].target, case["input.center_patch"])
    student, teacher = (Branch(case, name, objectives) for name in ("student", "teacher"))
    with torch.no_grad():
        teacher_features = teacher.features(objectives[1].needs().neighbors, batch)
    student_features = student.features(None, batch)
    terms, now = {}, cases.now_of(WeightedObjectives(objectives))
    for objective, part in zip(objectives, ("c_head", "p_head"), strict=True):
        sides = Side(*student_features, head=student.parts[part]), Side(*teacher_features, head=teacher.parts[part])
        terms |= objective(*sides, cases.views_of(batch, len(student_features[0].summary)), Cues(), now)
        objective.after_step()
    loss = terms["dino/cls"] + case.config["patch_weight"] * terms["selfpatch/patch"]
    case.close(f"output.loss_cls.k{k}", terms["dino/cls"], FP32)
    case.close(f"output.loss_patch.k{k}", terms["selfpatch/patch"], FP32)
    case.close(f"output.loss.k{k}", loss, FP32)
    case.close(f"output.center_cls.k{k}", objectives[0].target.center[None, None], FP32)
    case.close(f"output.center_patch.k{k}", objectives[1].target.center[None], FP32)
    if k in case.config["k_with_grad"]:
        loss.backward()
        check_gradients(case, student, k)


def objectives_of(case: Case, k: int) -> tuple[Dino, SelfPatch]:
    config, weights = case.config, case.under("weight.student.")
    same = {
        "bottleneck": config["bottleneck_dim"],
        "hidden": config["hidden_dim"],
        "train_norm": not config["norm_last_layer"],
        "student_temperature": config["student_temp"],
        "center_momentum": config["center_momentum"],
        **cases.schedule(config),
    }
    dino = DinoOptions(
        prototypes=config["out_dim"], center_over="all", layers=linear_layers(weights, "c_head.mlp."), **same
    )
    patch = SelfPatchOptions(
        prototypes=config["out_dim_patch"],
        teacher_sees_local=config["local_crops"] > 0,
        layers=linear_layers(weights, "p_head.mlp."),
        neighbors=NeighborRule(radius=config.get("window", 3) // 2, k=k),
        **same,
    )
    return Dino(dino), SelfPatch(patch)


def check_gradients(case: Case, student: Branch, k: int, rel: float = 2e-5) -> None:
    """Exactly the recorded gradients; those that exact arithmetic makes zero within the bound of their rounding alone."""
    for size, x in student.patches.items():
        case.close(f"grad.input.student_{size}.k{k}", x.grad, rel)
    for part, module in student.parts.items():
        prefix, bounds = f"grad.weight.student.k{k}.{part}.", student.bounds[part]
        theirs = {name: prefix + old for old in case.under(prefix) for name in renamed({old: None}, OUR_NAMES)}
        ours = gradients(module)
        assert set(ours) == set(theirs), f"{case.name}: {set(ours) ^ set(theirs)}"
        for name, gradient in ours.items():
            case.close(theirs[name], gradient, 0.0 if name in bounds else rel, floor=bounds.get(name, 0.0))


def gradients(module: nn.Module) -> dict:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def recorded_rule(config: dict) -> MaskRule:
    """A ratio is a number, or a list from which each crop draws."""
    means, spreads = (
        config[name] if isinstance(config[name], list) else [config[name]] for name in ("pred_ratio", "pred_ratio_var")
    )
    shapes = {"block": "block", "rand": "random"}
    if config["pred_shape"] not in shapes:
        skip_unsupported(f"masks of the shape {config['pred_shape']}")
    return MaskRule(tuple(zip(means, spreads, strict=True)), shapes[config["pred_shape"]])


@check("ibot_masks")
def ibot_masks(case: Case) -> None:
    """The same distribution, other random numbers: within four standard errors of the difference of two samples."""
    for name, config in case.config.items():
        side, samples = config["grid"], config["samples"]
        masks = ReleasedMasks(recorded_rule(config))
        drawn = unpack_bits([masks.patch_bits(sample, 0, (side, side)) for sample in range(samples)], side * side)
        recorded = case.under("output.stat.")
        counts = drawn.sum(dim=1)
        ratio = counts.double() / side**2
        error, rounding = (2 / samples) ** 0.5 * 4, 1e-12
        spread = recorded[f"std_ratio.{name}"]
        assert abs(ratio.mean() - recorded[f"mean_ratio.{name}"]) <= error * spread + rounding, name
        fourth = ((ratio - ratio.mean()) ** 4).mean() - ratio.var() ** 2  # the variance of squared deviations
        assert abs(ratio.var() - spread**2) <= error * fourth.clamp(min=0).sqrt() + rounding, name
        empty = recorded[f"empty_fraction.{name}"]
        assert abs((counts == 0).double().mean() - empty) <= error * (empty * (1 - empty)).sqrt() + rounding, name
        frequency = recorded[f"position_frequency.{name}"].double()
        deviation = (frequency * (1 - frequency)).sqrt().clamp(min=1 / samples)  # a patch may never have been masked
        errors = (drawn.double().mean(dim=0).view(side, side) - frequency) / deviation
        worst = errors.abs().max() / error * 4
        assert worst <= 5, f"{name}: {worst:.1f}"  # standard errors, as it is the worst of all patches
        check_histogram(name, torch.bincount(counts, minlength=side**2 + 1), recorded[f"count_histogram.{name}"])


def check_histogram(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Chi-square of two samples of equal size, within five of its own standard deviations."""
    total = (ours + theirs).double()
    bins = total >= 10
    chi = ((ours - theirs)[bins].double() ** 2 / total[bins]).sum()
    freedom = max(int(bins.sum()) - 1, 1)
    assert abs(ours.sum() - theirs.sum()) == 0
    assert chi <= freedom + 5 * (2 * freedom) ** 0.5, f"{name}: chi-square {chi:.1f} with {freedom} degrees of freedom"
