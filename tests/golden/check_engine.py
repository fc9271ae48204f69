"""Schedules, parameter groups, LARS and whole training steps against the recorded ones of DINO, iBOT and SelfPatch.

The training steps go through the real Trainer in float64; only its loader and the values of its schedules are given.
"""

import json
from dataclasses import replace

import torch
from harness import Case, check, linear_layers, renamed, skip_unsupported
from objective_cases import schedule
from rounding import RoundingBounds
from torch import Tensor, nn

from patchlight.data.policy import dino_policy
from patchlight.engine import assembly
from patchlight.engine.optim import TRUST, Lars, Update
from patchlight.engine.parallel import Mesh
from patchlight.engine.schedules import cosine
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.interface import NeighborRule
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.targets import TeacherTemperature
from patchlight.records import Clock, Crops, Views
from patchlight.run import Data, Model, Objectives, Optim, Output, Parallel, Run, Schedule
from patchlight_kernels import force

CPU = Mesh(torch.device("cpu"))


@check("dino_schedules")
def schedules(case: Case) -> None:
    for name, values in case.config.items():
        if name.startswith("teacher_temp"):
            rule = TeacherTemperature(
                values["warmup_teacher_temp"], values["teacher_temp"], values["warmup_teacher_temp_epochs"]
            )
            ours = [rule.at(Clock(epoch, values["nepochs"], 0, 1)) for epoch in range(values["nepochs"])]
        else:
            total, warmup = (values.get(epochs, 0) * values["niter_per_ep"] for epochs in ("epochs", "warmup_epochs"))
            start = values.get("start_warmup_value", 0.0)
            ours = [cosine(i, total, values["base_value"], values["final_value"], warmup, start) for i in range(total)]
        case.close(f"output.{name}", torch.tensor(ours, dtype=torch.float64), rel=0.0, floor=1e-12)


@check("dino_param_groups", "ibot_param_groups", "selfpatch_param_groups")
def parameter_groups(case: Case) -> None:
    """A model with the recorded names and numbers of dimensions goes through the real grouping."""
    names, frozen = json.loads(case.meta["param_names"]), json.loads(case.meta["frozen"])
    model = nn.Module()
    for name, ndim in zip(names, case["output.param_ndim"].tolist(), strict=True):
        *path, last = name.split(".")
        part = model
        for step in path:
            if step not in part._modules:
                part.add_module(step, nn.Module())
            part = part._modules[step]
        part.register_parameter(last, nn.Parameter(torch.ones([1] * ndim), name not in frozen))
    update = Update(model, None, Optim(), CPU)
    place = {id(p): 0 if decays else 1 for p, decays in zip(update.parameters, update.decayed, strict=True)}
    case.equal("output.group_index", torch.tensor([place.get(id(p), -1) for p in model.parameters()]))


@check("mocov3_lars")
def lars(case: Case) -> None:
    """For a matrix and a vector."""
    recorded = {key: float(case.meta[key]) for key in ("lr", "weight_decay", "momentum")}
    model = nn.ParameterDict({"weight": case["w0"].clone(), "bias": case["b0"].clone()})
    update = Update(model, None, Optim(name="lars", momentum=recorded["momentum"], clip=0), CPU)
    assert isinstance(update.optimizer, Lars)
    assert float(case.meta["trust_coefficient"]) == TRUST["lars"]
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in recorded.items()}
    values["freeze_prototypes"] = torch.zeros((), dtype=torch.float64)
    for number in range(len(list(case.numbered("gw")))):
        model["weight"].grad, model["bias"].grad = case[f"gw{number}"].clone(), case[f"gb{number}"].clone()
        update.step({"loss": torch.zeros(())}, values)
        case.close(f"w{number + 1}", model["weight"], rel=2e-5)
        case.close(f"b{number + 1}", model["bias"], rel=2e-5)


OUR_NAMES = {
    r"backbone\.masked_embed": "backbone.mask_token",
    r"head\.": "heads.{first}.",
    r"c_head\.": "heads.dino.",
    r"p_head\.": "heads.selfpatch.",
    r"ca_head\.cls_blocks\.(\d+)\.attn\.": r"summary.blocks.\1.",
    r"ca_head\.cls_blocks\.": "summary.blocks.",
    r"ca_head\.": "summary.",
}
HEAD_PARTS = {
    ".last_layer.": ".prototypes.",
    ".last_layer2.": ".own_patch_prototypes.",
    "head.mlp.weight": "head.mlp.0.weight",  # a head with a single layer has no list of layers there
    "head.mlp.bias": "head.mlp.0.bias",
}


def our_name(case: Case, recorded: str, first: str) -> str:
    """The name in our branches of a recorded parameter; `first` is the objective that owns "head"."""
    if is_semi(case):
        recorded = recorded.replace("head.last_layer2.", f"predictors.{first}.")
    for theirs, ours in HEAD_PARTS.items():
        recorded = recorded.replace(theirs, ours)
    (name,) = renamed({recorded: None}, OUR_NAMES)
    return name.format(first=first)


def is_semi(case: Case) -> bool:
    """The released defaults of iBOT: a student with separate prototypes and a teacher with one set."""
    return case.config.get("shared_head_teacher", False) and not case.config["shared_head_student"]


class RecordedViews:
    """Returns the recorded crops, step by step."""

    dataset_size = 1
    stall_seconds = 0.0

    def __init__(self, case: Case) -> None:
        self.case, self.step = case, 0

    def __next__(self) -> Views:
        crops = [crop.double() for crop in self.case.numbered(f"step{self.step}.input.crop")]
        self.step += 1
        batch, number = len(crops[0]), len(crops) - self.case.config["local_crops"]
        kinds = [crops_of(of_size) if of_size else None for of_size in (crops[:number], crops[number:])]
        return Views(*kinds, None, torch.arange(batch))


def crops_of(pixels: list[Tensor]) -> Crops:
    shape = len(pixels), len(pixels[0])
    return Crops(torch.stack(pixels), torch.zeros(*shape, 4), torch.zeros(shape) > 0)


class LastMetrics:
    """Keeps the terms of the last step."""

    def add(self, terms: dict[str, Tensor]) -> None:
        self.terms = terms


class RecordedTrainer:
    """The real trainer with the recorded values of its schedules; keeps the gradients as they were before clipping.

    number: of the recorded step, whose epoch need not follow that of the step before.
    """

    def __init__(self, run: Run, case: Case) -> None:
        self.case, self.number = case, 0
        self.trainer = assembly.build_trainer(run, CPU, RecordedViews(case), LastMetrics())
        self.scheduled = self.trainer.step_values.schedule
        self.trainer.step_values.schedule = self.recorded_schedule
        self.student, self.teacher = self.trainer.student, self.trainer.teacher
        self.objectives, self.metrics, self.update = self.trainer.objectives, self.trainer.metrics, self.trainer.update
        self.unclipped: list[Tensor | None] = []
        compute_norms = self.update.norms

        def norms(tensors: list) -> Tensor:
            self.unclipped = [None if tensor is None else tensor.clone() for tensor in tensors]
            return compute_norms(tensors)

        self.update.norms = norms

    def recorded_schedule(self, clock: Clock) -> dict[str, float]:
        recorded = {"lr": "lr", "weight_decay": "weight_decay", "momentum": "ema_momentum"}
        rates = {name: self.case.config[where][self.number] for name, where in recorded.items()}
        return self.scheduled(clock) | rates

    def step(self, number: int, epoch: int) -> None:
        self.number, clock = number, self.trainer.clock
        self.trainer.clock = replace(clock, step=epoch * clock.steps_per_epoch)
        self.trainer.step()


def recorded_run(case: Case, options: tuple, weights: dict[str, float] | None = None, summary: str = "cls") -> Run:
    case.skip_unless(layernorm_eps=1e-6, drop_path=0.0, initial_center="zeros", act="gelu")
    config, recorded_weights = case.config, case.under("step0.weight.student.")
    if config["adamw"]["eps"] != 1e-8:
        skip_unsupported("an eps of AdamW other than 1e-8")
    sizes = {
        "width": config["embed_dim"],
        "depth": config["depth"],
        "heads": config["num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "qkv_bias": "backbone.blocks.0.attn.qkv.bias" in recorded_weights,
    }
    model = Model(
        patch_size=config["patch_size"], image_size=config["img_size"], drop_path=0.0, summary=summary, sizes=sizes
    )
    crops = dino_policy(config["local_crops"], config["img_size"], config.get("local_size", config["img_size"]))
    return Run(
        model=model,
        objectives=Objectives(options, weights or {}),
        data=Data(loader="procedural", crops=crops, batch_per_rank=config["batch"], workers=0),
        optim=Optim(
            clip=config["clip_grad"],
            betas=tuple(config["adamw"]["betas"]),
            freeze_prototypes_epochs=config["freeze_last_layer_epochs"],
            warmup_epochs=0,
        ),
        schedule=Schedule(epochs=config["nepochs"], steps_per_epoch=1),
        parallel=Parallel(precision="fp32"),
        output=Output(folder="unused"),
    )


def head_options(case: Case, head: str = "head") -> dict:
    config = case.config
    return {
        "layers": linear_layers(case.under("step0.weight.student."), f"{head}.mlp."),
        "prototypes": config["out_dim"],
        "bottleneck": config["bottleneck_dim"],
        "hidden": config["hidden_dim"],
        "train_norm": not config["norm_last_layer"],
        "student_temperature": config["student_temp"],
        "center_momentum": config["center_momentum"],
        **schedule(config),
    }


def build_trainer(case: Case, run: Run) -> RecordedTrainer:
    """In float64, as recorded."""
    torch.set_default_dtype(torch.float64)
    try:
        return RecordedTrainer(run, case)
    finally:
        torch.set_default_dtype(torch.float32)


def load(trainer: RecordedTrainer, case: Case, first: str) -> None:
    weights = {our_name(case, name, first): value for name, value in case.under("step0.weight.student.").items()}
    weights.setdefault("backbone.mask_token", torch.zeros(1, case.config["embed_dim"]))
    trainer.student.load_state_dict(weights, strict=True)
    trainer.teacher.start_from(trainer.student)


def compare_steps(case: Case, trainer: RecordedTrainer, first: str, outputs: dict) -> None:
    """Every step: terms, centers, gradients and their norms before clipping; then the final weights of both branches."""
    order = [our_name(case, name, first) for name in json.loads(case.meta["param_order"])]
    bounds = RoundingBounds(trainer.student)
    for number, epoch in enumerate(case.config["epoch_of_step"]):
        trainer.step(number, epoch)
        for key in outputs.keys() & case.under(f"step{number}.output.").keys():
            case.close(f"step{number}.output.{key}", outputs[key](trainer), rel=1e-5)
        gradients = dict(zip(trainer.update.names, trainer.unclipped, strict=True))
        zero = torch.zeros((), dtype=torch.float64)
        norms = [zero if gradients[name] is None else gradients[name].norm() for name in order if name in gradients]
        case.close(f"step{number}.output.grad_norms_before_clip", torch.stack(norms), rel=1e-5)
        for name in case.under(f"step{number}.grad.student."):
            ours = our_name(case, name, first)
            rel = 0.0 if ours in bounds else 1e-4
            case.close(f"step{number}.grad.student.{name}", gradients[ours], rel, floor=bounds.get(ours, 0.0))
        bounds.clear_gradients()
    for branch in (trainer.student, trainer.teacher):
        ours = branch.state_dict()
        prefix = f"final.weight.{type(branch).__name__.lower()}."
        for name in case.under(prefix):
            check_weight(case, prefix + name, ours[our_name(case, name, first)])


def check_weight(case: Case, key: str, ours: Tensor) -> None:
    """Within 5e-6; for a key's bias, whose gradient is rounding noise, Adam makes whole steps of it, in both runs."""
    noise = 2 * sum(case.config["lr"])
    allowed = torch.full_like(ours, 5e-6)
    if key.endswith("attn.k.bias"):
        allowed[:] = noise
    if key.endswith("attn.qkv.bias"):
        allowed.chunk(3)[1][:] = noise
    case.close(key, ours, rel=0.0, floor=allowed)


@check("dino_train_step")
def dino_steps(case: Case) -> None:
    trainer = build_trainer(case, recorded_run(case, (DinoOptions(**head_options(case)),)))
    load(trainer, case, "dino")
    (dino,) = trainer.objectives.objectives()
    outputs = {"loss": lambda t: t.metrics.terms["dino/cls"], "center": lambda t: dino.target.center[None]}
    compare_steps(case, trainer, "dino", outputs)


def ibot_options(case: Case) -> IbotOptions:
    config = case.config
    if config["shared_head_student"] and not config["shared_head_teacher"]:
        skip_unsupported("a teacher with patch prototypes of its own beside a student without")
    return IbotOptions(
        **head_options(case),
        heads="semi" if is_semi(case) else None,
        patch_prototypes=None if config["shared_head_student"] or is_semi(case) else config["patch_out_dim"],
        patch_start_epoch=config.get("mim_start_epoch", 0),
        patch_teacher_temperature=config["teacher_patch_temp"],
        warmup_patch_teacher_temperature=config["warmup_teacher_patch_temp"],
        patch_center_momentum=config.get("center_momentum2", config["center_momentum"]),
    )


class RecordedMasks:
    """The recorded masks, step by step."""

    on_host = True

    def __init__(self, case: Case) -> None:
        masks = (list(case.numbered(f"step{number}.input.mask_crop")) for number in range(case.step_count()))
        self.steps = [torch.stack(of_crops).flatten(2) for of_crops in masks]
        self.patches = self.steps[0].numel()

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        return self.patches

    def __call__(self, *arguments: object) -> Tensor:
        return self.steps.pop(0)


@check("ibot_train_step")
def ibot_steps(case: Case) -> None:
    weights = {"ibot/cls": case.config.get("lambda1", 1.0), "ibot/patch": case.config.get("lambda2", 1.0)}
    trainer = build_trainer(case, recorded_run(case, (ibot_options(case),), weights))
    (ibot,) = trainer.objectives.objectives()
    ibot.masks = RecordedMasks(case)
    load(trainer, case, "ibot")
    if is_semi(case):  # there the teacher starts as the student's prototypes for patches
        recorded = case.under("step0.weight.teacher.head.last_layer.")
        trainer.teacher.heads["ibot"].prototypes.load_state_dict({n: v.double() for n, v in recorded.items()})
    outputs = {
        "loss": lambda t: t.metrics.terms["loss"],
        "loss_cls": lambda t: t.metrics.terms["ibot/cls"] * weights["ibot/cls"],  # recorded with their weights
        "loss_patch": lambda t: t.metrics.terms["ibot/patch"] * weights["ibot/patch"],
        "center_cls": lambda t: ibot.target.center[None],
        "center_patch": lambda t: ibot.patch_target.center[None, None],
    }
    compare_steps(case, trainer, "ibot", outputs)


@check("selfpatch_train_step")
def selfpatch_steps(case: Case) -> None:
    config = case.config
    case.skip_unless(mlp_ratio=4)  # a run builds its class attention with the same ratio
    common = head_options(case, "c_head")
    patch = SelfPatchOptions(
        **{**head_options(case, "p_head"), "prototypes": config["out_dim_patch"]},
        neighbors=NeighborRule(radius=config.get("window", 3) // 2, k=config["k"]),
        teacher_sees_local=config["local_crops"] > 0,
    )
    options = (DinoOptions(**common, center_over="all"), patch)
    weights = {"selfpatch/patch": config["patch_weight"]}
    trainer = build_trainer(case, recorded_run(case, options, weights, summary="class_attention"))
    load(trainer, case, "dino")
    dino, selfpatch = trainer.objectives.objectives()
    outputs = {
        "loss": lambda t: t.metrics.terms["loss"],
        "loss_cls": lambda t: t.metrics.terms["dino/cls"],
        "loss_patch": lambda t: t.metrics.terms["selfpatch/patch"],
        "center_cls": lambda t: dino.target.center[None, None],
        "center_patch": lambda t: selfpatch.target.center[None],
    }
    with force(neighbor_topk="reference"):  # the op has cases of its own
        compare_steps(case, trainer, "dino", outputs)
