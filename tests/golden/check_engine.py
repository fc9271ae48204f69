"""Schedules, parameter groups, LARS and whole training steps against the recorded ones of DINO, iBOT and SelfPatch.

The training steps go through the real Trainer in float64; only its loader and the values of its schedules are given.
"""

import json

import torch
from harness import Case, check
from objective_cases import schedule
from torch import Tensor, nn

from patchlight.data.policy import dino_policy
from patchlight.engine.optim import Lars, Update
from patchlight.engine.parallel import Mesh
from patchlight.engine.schedules import cosine
from patchlight.engine.trainer import Trainer
from patchlight.heads.projection import ProjectionHead
from patchlight.heads.prototypes import Prototypes
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
    for name, of in case.config.items():
        if name.startswith("teacher_temp"):
            rule = TeacherTemperature(of["warmup_teacher_temp"], of["teacher_temp"], of["warmup_teacher_temp_epochs"])
            ours = [rule.at(Clock(epoch, of["nepochs"], 0, 1)) for epoch in range(of["nepochs"])]
        else:
            total, warmup = (of.get(epochs, 0) * of["niter_per_ep"] for epochs in ("epochs", "warmup_epochs"))
            start = of.get("start_warmup_value", 0.0)
            ours = [cosine(i, total, of["base_value"], of["final_value"], warmup, start) for i in range(total)]
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
    groups = Update(model, Optim(), CPU).optimizer.param_groups
    place = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    case.equal("output.group_index", torch.tensor([place.get(id(p), -1) for p in model.parameters()]))


@check("mocov3_lars")
def lars(case: Case) -> None:
    """Three steps of one matrix and one vector."""
    recorded = {key: float(case.meta[key]) for key in ("lr", "weight_decay", "momentum")}
    model = nn.ParameterDict({"weight": case["w0"].clone(), "bias": case["b0"].clone()})
    update = Update(model, Optim(name="lars", momentum=recorded["momentum"], clip=0), CPU)
    assert isinstance(update.optimizer, Lars)
    assert float(case.meta["trust_coefficient"]) == Lars.TRUST
    for number in range(3):
        model["weight"].grad, model["bias"].grad = case[f"gw{number}"].clone(), case[f"gb{number}"].clone()
        update.step({"loss": torch.zeros(())}, recorded["lr"], recorded["weight_decay"], freeze=False)
        case.close(f"w{number + 1}", model["weight"], rel=2e-5)
        case.close(f"b{number + 1}", model["bias"], rel=2e-5)


OUR_NAMES = {
    "backbone.masked_embed": "backbone.mask_token",
    "backbone.": "backbone.",
    "head.": "heads.{first}.",
    "c_head.": "heads.dino.",
    "p_head.": "heads.selfpatch.",
    "ca_head.cls_blocks.0.attn.": "summary.blocks.0.",
    "ca_head.cls_blocks.1.attn.": "summary.blocks.1.",
    "ca_head.cls_blocks.": "summary.blocks.",
    "ca_head.": "summary.",
}


def our_name(recorded: str, first: str) -> str:
    """The name in our branches of a recorded parameter; `first` is the objective that owns "head"."""
    prefix = next(old for old in OUR_NAMES if recorded.startswith(old))
    name = OUR_NAMES[prefix].format(first=first) + recorded.removeprefix(prefix)
    return name.replace(".last_layer.", ".prototypes.").replace(".last_layer2.", ".own_patch_prototypes.")


class RecordedViews:
    """Hands out the recorded crops, step by step."""

    dataset_size = 1
    stall_seconds = 0.0

    def __init__(self, case: Case) -> None:
        self.case, self.step = case, 0

    def __next__(self) -> Views:
        crops = self.case.under(f"step{self.step}.input.crop")
        self.step += 1
        of_sizes = [torch.stack([crops[number].double() for number in pair]) for pair in ("01", "23")]
        batch = of_sizes[0].shape[1]
        kinds = [Crops(x, torch.zeros(2, batch, 4), torch.zeros(2, batch) > 0) for x in of_sizes]
        return Views(*kinds, None, torch.arange(batch))


class Silent:
    """Metrics of the last step."""

    def add(self, terms: dict[str, Tensor]) -> None:
        self.terms = terms


class RecordedTrainer(Trainer):
    """The real trainer with the recorded values of its schedules; keeps the gradients as they were before clipping."""

    def __init__(self, run: Run, case: Case) -> None:
        self.case = case
        super().__init__(run, CPU, RecordedViews(case), Silent())
        self.unclipped: list[Tensor | None] = []
        compute_norms = self.update.norms

        def norms(tensors: list) -> Tensor:
            self.unclipped = [None if tensor is None else tensor.clone() for tensor in tensors]
            return compute_norms(tensors)

        self.update.norms = norms

    def recorded(self, name: str) -> float:
        return self.case.config[name][self.clock.step]

    lr = property(lambda self: self.recorded("lr"))
    weight_decay = property(lambda self: self.recorded("weight_decay"))
    momentum = property(lambda self: self.recorded("ema_momentum"))


def recorded_run(case: Case, options: tuple, weights: dict[str, float] | None = None, summary: str = "cls") -> Run:
    config = case.config
    sizes = {"width": config["embed_dim"], "depth": config["depth"], "heads": config["num_heads"]}
    model = Model(
        patch_size=config["patch_size"], image_size=config["img_size"], drop_path=0.0, summary=summary, sizes=sizes
    )
    crops = dino_policy(2, config["img_size"], config["local_size"])
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


def head_options(config: dict) -> dict:
    return {
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


def load(trainer: Trainer, case: Case, first: str) -> None:
    weights = {our_name(name, first): value for name, value in case.under("step0.weight.student.").items()}
    weights.setdefault("backbone.mask_token", torch.zeros(1, case.config["embed_dim"]))
    trainer.student.load_state_dict(weights, strict=True)
    trainer.teacher.start_from(trainer.student)


def follow_recorded_steps(case: Case, trainer: RecordedTrainer, first: str, outputs: dict) -> None:
    """Both steps: terms, centers, gradients and their norms before clipping; then the final weights of both branches."""
    order = [our_name(name, first) for name in json.loads(case.meta["param_order"])]
    for number, epoch in enumerate(case.config["epoch_of_step"]):
        assert trainer.clock.epoch == epoch
        trainer.step()
        for key, read in outputs.items():
            case.close(f"step{number}.output.{key}", read(trainer), rel=1e-5)
        gradients = dict(zip(trainer.update.names, trainer.unclipped, strict=True))
        zero = torch.zeros((), dtype=torch.float64)
        norms = [zero if gradients[name] is None else gradients[name].norm() for name in order if name in gradients]
        case.close(f"step{number}.output.grad_norms_before_clip", torch.stack(norms), rel=1e-5)
        for name in case.under(f"step{number}.grad.student."):
            case.close(f"step{number}.grad.student.{name}", gradients[our_name(name, first)], rel=1e-4, floor=1e-9)
    for branch in (trainer.student, trainer.teacher):
        ours = branch.state_dict()
        prefix = f"final.weight.{type(branch).__name__.lower()}."
        for name in case.under(prefix):
            check_weight(case, prefix + name, ours[our_name(name, first)])


def check_weight(case: Case, key: str, ours: Tensor) -> None:
    """To 5e-6; a key's bias has no gradient on paper, and Adam turns its rounding noise into whole steps."""
    noise = 2 * sum(case.config["lr"])
    allowed = torch.full_like(ours, 5e-6)
    if key.endswith("attn.k.bias"):
        allowed[:] = noise
    if key.endswith("attn.qkv.bias"):
        allowed.chunk(3)[1][:] = noise
    off = (ours - case[key].double()).abs() - allowed
    assert off.max() <= 0, f"{case.name} {key}: off by {off.max():.2e} more than allowed"


@check("dino_train_step")
def dino_steps(case: Case) -> None:
    trainer = build_trainer(case, recorded_run(case, (DinoOptions(**head_options(case.config)),)))
    load(trainer, case, "dino")
    (dino,) = trainer.objectives.parts
    outputs = {"loss": lambda t: t.metrics.terms["dino/cls"], "center": lambda t: dino.target.center[None]}
    follow_recorded_steps(case, trainer, "dino", outputs)


def ibot_options(config: dict) -> IbotOptions:
    return IbotOptions(
        **head_options(config),
        patch_prototypes=None if config["shared_head_student"] else config["patch_out_dim"],
        patch_teacher_temperature=config["teacher_patch_temp"],
        warmup_patch_teacher_temperature=config["warmup_teacher_patch_temp"],
        patch_center_momentum=config["center_momentum"],
    )


class RecordedMasks:
    """The recorded masks, step by step."""

    def __init__(self, case: Case) -> None:
        steps = (case.under(f"step{number}.input.mask_crop") for number in (0, 1))
        self.steps = [torch.stack([masks["0"], masks["1"]]).flatten(2) for masks in steps]

    def rows(self, views: int, batch: int, grid: tuple[int, int]) -> int:
        return self.steps[0].numel()

    def __call__(self, *about: object) -> Tensor:
        return self.steps.pop(0)


@check("ibot_train_step")
def ibot_steps(case: Case) -> None:
    trainer = build_trainer(case, recorded_run(case, (ibot_options(case.config),)))
    (ibot,) = trainer.objectives.parts
    ibot.masks = RecordedMasks(case)
    load(trainer, case, "ibot")
    if not case.config["shared_head_student"]:
        share_the_teachers_prototypes(case, trainer, ibot)
    outputs = {
        "loss": lambda t: t.metrics.terms["loss"],
        "loss_cls": lambda t: t.metrics.terms["ibot/cls"],
        "loss_patch": lambda t: t.metrics.terms["ibot/patch"],
        "center_cls": lambda t: ibot.target.center[None],
        "center_patch": lambda t: ibot.patch_target.center[None, None],
    }
    follow_recorded_steps(case, trainer, "ibot", outputs)


def share_the_teachers_prototypes(case: Case, trainer: Trainer, ibot: nn.Module) -> None:
    """The released defaults: a student with separate heads and a teacher with one, which starts as the student's patch head."""
    o = ibot.options
    ours = ProjectionHead(
        case.config["embed_dim"],
        o.bottleneck,
        o.hidden,
        o.layers,
        prototypes=Prototypes(o.bottleneck, o.prototypes, o.train_norm),
    ).double()
    ours.load_state_dict({n: t for n, t in trainer.teacher.heads["ibot"].state_dict().items() if "own_" not in n})
    recorded = case.under("step0.weight.teacher.head.last_layer.")
    ours.prototypes.load_state_dict({name: value.double() for name, value in recorded.items()})
    trainer.teacher.heads["ibot"] = ours.requires_grad_(False)


@check("selfpatch_train_step")
def selfpatch_steps(case: Case) -> None:
    common = head_options(case.config)
    patch = SelfPatchOptions(
        **{**common, "prototypes": case.config["out_dim_patch"]}, neighbors=NeighborRule(k=case.config["k"])
    )
    options = (DinoOptions(**common, center_over="all"), patch)
    weights = {"selfpatch/patch": case.config["patch_weight"]}
    trainer = build_trainer(case, recorded_run(case, options, weights, summary="class_attention"))
    load(trainer, case, "dino")
    dino, selfpatch = trainer.objectives.parts
    outputs = {
        "loss": lambda t: t.metrics.terms["loss"],
        "loss_cls": lambda t: t.metrics.terms["dino/cls"],
        "loss_patch": lambda t: t.metrics.terms["selfpatch/patch"],
        "center_cls": lambda t: dino.target.center[None, None],
        "center_patch": lambda t: selfpatch.target.center[None],
    }
    with force(neighbor_topk="reference"):  # the op has its own cases
        follow_recorded_steps(case, trainer, "dino", outputs)
