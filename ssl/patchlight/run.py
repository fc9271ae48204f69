"""The complete description of a run: `Run` and its parts. A recipe is a function that returns a `Run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .checks import check, check_choice, check_number, check_numbers, sentence
from .data.interface import MOST_BAD
from .data.loaders import LOADERS
from .data.masking import MaskRule
from .data.policy import CropPolicy, dino_policy
from .data.reading import TIMEOUT
from .data.stored import MOST_PIXELS, PILLOWS_MOST_PIXELS
from .file_functions import names_function
from .objectives import OBJECTIVES, DinoOptions, ObjectiveOptions
from .values import Reader, nearest

PASSED = "source="  # how Data.path begins where images were passed to train; the name of their class follows


@dataclass(frozen=True)
class Model:
    """The network of both branches, without the heads of the objectives."""

    arch: str = "vit_small"
    """Name of the backbone, as build_backbone takes it."""
    patch_size: int = 16
    """Pixels between neighboring patches."""
    image_size: int = 224
    """Side in pixels of the global crops; the position table is made for it."""
    drop_path: float = 0.1
    """Rate at which the student's last block drops a residual branch; the teacher drops none."""
    summary: str = "cls"
    """The vector of an image: the class token (cls), class attention over the patches (class_attention), or their mean."""
    position_resize: str = "released"
    """How the position table is resized for local crops: released (by a scale factor, as in the released code) or size."""
    positions: str = "learned"
    """The position table of a vision transformer: learned, or fixed: sincos or sincos_printed (PQCL needs one of these),
    or sincos_rows_first (as in MoCo v3)."""
    start: str = "dino"
    """How a vision transformer's weights are initialized: as in DINO and iBOT (dino), or as in MoCo v3 (moco_v3)."""
    init_from: str = ""
    """A file of published weights to start from: DINO, iBOT, DINOv2, SelfPatch, SERE, PQCL, MoCo v3, MoBY, timm or ours."""
    freeze_patch_embed: bool = False
    """Keep the patch projection at its initial weights, which makes MoCo v3 more stable."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Other sizes than the architecture's own, e.g. {"depth": 2, "width": 32, "heads": 2} for a test."""

    def __post_init__(self) -> None:
        check_numbers(self, patch_size="[1, inf)", image_size="[1, inf)", drop_path="[0, 1)")
        for name, size in self.sizes.items():
            if not isinstance(size, bool):  # a switch, as qkv_bias
                check_number(f"Model.sizes[{name!r}]", size, "(0, inf)", "leave it out for the architecture's own")
        check_choice("Model.summary", self.summary, ("cls", "class_attention", "mean"))
        check_choice("Model.positions", self.positions, ("learned", "sincos", "sincos_rows_first", "sincos_printed"))
        check(
            self.image_size % self.patch_size == 0,
            "Model.image_size must be a multiple of patch_size",
            f"{self.image_size} and {self.patch_size}",
            "change one of them",
        )


@dataclass(frozen=True)
class Objectives:
    """The losses and their weights."""

    options: tuple[ObjectiveOptions, ...] = (DinoOptions(),)
    """One entry per objective."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of a loss term by its name, e.g. {"selfpatch/patch": 0.1}; 1 for the others."""
    masks: MaskRule = MaskRule()  # noqa: RUF009 frozen
    """How much of the student's global crops is masked, where an objective needs masks."""
    mask_counts: str = "fixed"
    """fixed: every batch has equally many masked patches, so shapes never change; released: the count varies as in iBOT."""

    def __post_init__(self) -> None:
        check_choice("Objectives.mask_counts", self.mask_counts, ("fixed", "released"))
        kinds = [type(options).__name__ for options in self.options]
        check(len(kinds) > 0, "Objectives.options needs at least one objective", "none", "add DinoOptions()")
        unknown = [type(options).__name__ for options in self.options if type(options) not in OBJECTIVES.values()]
        check(
            not unknown, "Objectives.options must be registered options", unknown, "call patchlight.objectives.register"
        )
        check(len(set(kinds)) == len(kinds), "Objectives.options may name each objective once", kinds, "remove one")
        for term, weight in self.weights.items():
            check_number(f"Objectives.weights[{term!r}]", weight, "[0, inf)", "use 0 to leave a term out")


@dataclass(frozen=True)
class Data:
    """Where images come from and how they are cropped."""

    path: str = ""
    """Images: a folder, tar shards, what check_data wrote, or my_file.py:my_function, which returns a data set
    (docs/data.md); empty for the procedural images."""
    loader: str = "auto"
    """auto: dali for files on a GPU, torchvision elsewhere; dali: decoded and cropped by NVIDIA DALI; torchvision: read and
    cropped on the CPU; procedural: generated images."""
    photometric: str = "op"
    """What changes colors: op, our own operation, or dali, DALI's operators, whose results differ (docs/data.md)."""
    crops: CropPolicy = dino_policy()  # noqa: RUF009 frozen
    """Which crops are made of an image."""
    batch_per_rank: int = 64
    """Images of one process in one batch; the global batch is this x processes x Parallel.accumulate."""
    workers: int = 8
    """Processes (or threads) per rank that read ahead; 0 reads in the training process."""
    procedural_images: int = 4096
    """How many procedural images there are."""
    most_bad: float = MOST_BAD
    """Share of unreadable images at which a run stops; below it, others replace them and are counted in the log."""
    most_pixels: int = MOST_PIXELS
    """An image of more pixels counts as unreadable: it would take too much memory."""
    timeout: float = TIMEOUT
    """Seconds in which a worker must begin another image; else it is started anew, or with threads (dali) the run ends."""

    def __post_init__(self) -> None:
        check_choice("Data.loader", self.loader, LOADERS)
        check_choice("Data.photometric", self.photometric, ("op", "dali"))
        check(
            self.photometric == "op" or self.loader == "dali",
            'Data.photometric="dali" needs the dali loader',
            f"loader={self.loader!r}",
            'set loader="dali"',
        )
        check_numbers(self, batch_per_rank="[1, inf)", workers="[0, inf)", procedural_images="[1, inf)")
        check_numbers(self, most_bad="[0, 1]", timeout="(0, inf)")
        check_numbers(self, most_pixels=f"[1, {PILLOWS_MOST_PIXELS}]")  # Pillow opens no larger image
        if self.path and self.loader == "procedural":
            self._refuse_path()

    @property
    def own(self) -> bool:
        """Whether the images are a data set of the user's own."""
        return names_function(self.path) or self.path.startswith(PASSED)

    def check_path(self) -> None:
        """A ValueError unless it says where images are; where they are passed to `train`, it need not."""
        if not self.path and self.loader != "procedural":
            self._refuse_path()
        rule = (
            "The images of this run were passed to train as source, which its settings do not hold; they must be there"
        )
        remedy = "call patchlight.train(run, source=...) again, or set Data.path to my_file.py:my_function"
        check(not self.path.startswith(PASSED), rule, f"only the name of their class, {self.path}", remedy)

    def _refuse_path(self) -> None:
        rule = "Data.path must be set for every loader except procedural, and empty for that one"
        remedy = 'set loader="auto" and a path for your images, or loader="procedural" and no path'
        raise ValueError(sentence(rule, f"path={self.path!r} with loader={self.loader!r}", remedy))


HIGHEST_RATES = {"adamw": 0.05, "lamb": 1.0, "sgd": 10.0, "lars": 100.0}  # far above all published runs


@dataclass(frozen=True)
class Optim:
    """How the student and the teacher are updated."""

    name: str = "adamw"
    """adamw, lars, lamb or sgd."""
    base_lr: float = 5e-4
    """Learning rate per 256 images of the global batch: the rate in effect is base_lr x global batch / 256."""
    min_lr: float = 1e-6
    """The learning rate at the end of its cosine."""
    warmup_epochs: float = 10
    """Epochs over which the learning rate rises."""
    warmup_start_lr: float = 0.0
    """The learning rate in effect at the first step of the warm-up."""
    warmup_ends: str = "last"
    """The first step with the full rate: the warm-up's last (last), as in DINO, or the next, as in MoCo v3 and MoBY."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end, reached by a cosine."""
    decayed: str = "matrices"
    """What decays: all but biases and vectors (matrices); also biases, as in SERE's release; or all, as in MoCo v3."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments of adamw and lamb."""
    momentum: float = 0.9
    """Momentum of lars and sgd."""
    clip: float = 3.0
    """Largest norm of a gradient; 0 turns clipping off."""
    clip_mode: str = "per_tensor"
    """per_tensor: each gradient has its own norm, as released; global: one norm over all, as in the papers."""
    teacher_momentum: float = 0.996
    """Share of its weights that the teacher keeps in a step, at the start of the run."""
    teacher_momentum_end: float = 1.0
    """The same at the end, reached by a cosine."""
    freeze_prototypes_epochs: int = 1
    """The number of first epochs in which the prototypes are not updated."""
    most_refused: int = 20
    """After so many non-finite steps in a row, all of them skipped, the run ends with an error."""

    def __post_init__(self) -> None:
        check_choice("Optim.name", self.name, ("adamw", "lars", "lamb", "sgd"))
        check_choice("Optim.clip_mode", self.clip_mode, ("per_tensor", "global"))
        check_choice("Optim.warmup_ends", self.warmup_ends, ("last", "next"))
        check_choice("Optim.decayed", self.decayed, ("matrices", "biases", "all"))
        rates = ("base_lr", "min_lr", "warmup_start_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip")
        check_numbers(self, **dict.fromkeys(rates, "[0, inf)"))
        check_numbers(self, momentum="[0, 1)", teacher_momentum="[0, 1]", teacher_momentum_end="[0, 1]")
        check_numbers(self, freeze_prototypes_epochs="[0, inf)", most_refused="[1, inf)")
        check(len(self.betas) == 2, "Optim.betas must be two numbers", self.betas, "the default is (0.9, 0.999)")
        for number, beta in enumerate(self.betas):
            check_number(f"Optim.betas[{number}]", beta, "[0, 1)", "the default is (0.9, 0.999)")

    def peak_lr(self, global_batch: int) -> float:
        """Linear rule: base_lr per 256 images."""
        return self.base_lr * global_batch / 256

    def doubts(self, global_batch: int) -> list[str]:
        """Sentences about rates that are allowed and seldom meant."""
        peak, start, found = self.peak_lr(global_batch), self.warmup_start_lr, []
        rule = f"{self.base_lr:g} x {global_batch} / 256 = {peak:g}"
        if peak < self.min_lr:
            found.append(
                f"The learning rate rises to its end: its peak, {rule}, is below Optim.min_lr={self.min_lr:g}; lower "
                "Optim.min_lr, or raise Optim.base_lr or the global batch."
            )
        if start > peak:
            found.append(
                f"The warm-up lowers the learning rate: it starts with Optim.warmup_start_lr={start:g} and ends with "
                f"{rule}; lower Optim.warmup_start_lr."
            )
        if peak > (usual := HIGHEST_RATES[self.name]):
            found.append(
                f"The learning rate is far above what {self.name} trains with: its peak is {rule}, and above {usual:g} a "
                "step changes weights by more than they are; lower Optim.base_lr."
            )
        for name in ("teacher_momentum", "teacher_momentum_end"):
            if getattr(self, name) == 0:
                when = "at the start" if name == "teacher_momentum" else "at the end"
                found.append(
                    f"The teacher is the student {when}: with Optim.{name}=0 it is a copy after each step, and its targets "
                    "are no steadier than the student; 0.996 is usual."
                )
        return found


@dataclass(frozen=True)
class Schedule:
    """How long the run is; all schedules are functions of the step."""

    epochs: int = 100
    """Passes over the images."""
    steps_per_epoch: int | None = None
    """Optimizer steps that count as an epoch; by default images // global batch."""

    def __post_init__(self) -> None:
        check_numbers(self, epochs="[1, inf)", steps_per_epoch="[1, inf)")


@dataclass(frozen=True)
class Parallel:
    """How the work is divided over processes, and its number format."""

    replicate: int | None = None
    """Copies of the model; by default as many as there are processes / shard."""
    shard: int = 1
    """Processes over which one copy of the model is sharded (FSDP2)."""
    accumulate: int = 1
    """Batches whose gradients make one optimizer step; teacher, centers and schedules change once per step."""
    precision: str = "auto"
    """The format of the forward pass: bf16, fp16 (with loss scaling), fp32, or auto: bf16 where the hardware multiplies it, else
    fp32. Parameters stay fp32."""
    graph: str = "auto"
    """The whole step as one CUDA graph: on, off, or auto: where it can be; the run says which it is, and why."""
    residual: str = "fp32"
    """fp32 or 16bit: the format of a vision transformer's tokens between its blocks; 16bit acts under bf16 and fp16 only."""
    compile: str = "auto"
    """auto: the branches and heads are compiled with torch.compile where the step is a CUDA graph; on and off: always, never."""
    checkpoint_activations: bool = False
    """Keep only each block's input for backward: less memory, one more forward."""
    deterministic: bool = False
    """Equal runs give bit-identical results, or an error names the operation that cannot."""
    seed: int = 0
    """Seed of weights, data order, crops and masks."""

    def __post_init__(self) -> None:
        check_choice("Parallel.precision", self.precision, ("auto", "bf16", "fp16", "fp32"))
        check_choice("Parallel.graph", self.graph, ("auto", "on", "off"))
        check_choice("Parallel.residual", self.residual, ("fp32", "16bit"))
        check_choice("Parallel.compile", self.compile, ("auto", "on", "off"))
        check_numbers(self, replicate="[1, inf)", shard="[1, inf)", accumulate="[1, inf)", seed="[0, inf)")


TRACKERS = ("auto", "tensorboard", "wandb")


@dataclass(frozen=True)
class Output:
    """Where results go."""

    folder: str = "runs/patchlight"
    """Folder of this run: metrics, checkpoints, the exported teacher."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 3
    """How many checkpoints to keep, the latest ones."""
    save_async: bool = False
    """Write checkpoints while training continues; needs a copy of the state in host memory."""
    log_every: int = 50
    """Steps between log lines; only there does the host wait for the device."""
    evaluate_every: int | None = None
    """Steps between evaluations of the teacher (k-NN accuracy, attention pictures); by default those of an epoch. 0: never."""
    best: str = ""
    """A number of the evaluations, k10 or k20: the checkpoint of its highest value is kept beside the latest, as `best`."""
    track: tuple[str, ...] = ("auto",)
    """Where numbers and pictures go besides the files: tensorboard, wandb, none; auto: tensorboard where it is installed."""
    profile: int = 0
    """Steps to record with torch's profiler, after the warm-up: operations, kernels and parts of a step, in profile/. 0: none."""
    resume: bool = False
    """Continue from the latest checkpoint in the folder; start anew if there is none."""

    def __post_init__(self) -> None:
        check_numbers(self, save_every="[1, inf)", keep="[1, inf)", log_every="[1, inf)", evaluate_every="[0, inf)")
        check_numbers(self, profile="[0, inf)")
        check(isinstance(self.best, str), "Output.best must be a name", repr(self.best), "use k20, or leave it out")
        rule, got = "Output.track must be a tuple of names", repr(self.track)
        check(isinstance(self.track, tuple | list), rule, got, 'use ("tensorboard",), or () for none')
        for name in self.track:
            remedy = nearest(name, TRACKERS, "none leaves all out")
            check(name in TRACKERS, f"Output.track may name {', '.join(TRACKERS)}", repr(name), remedy)
        check(
            not self.best or self.evaluate_every != 0,
            "Output.best needs evaluations of the teacher",
            f"best={self.best!r} with evaluate_every=0",
            "set evaluate_every, or leave it out for one per epoch",
        )


@dataclass(frozen=True)
class Run:
    """All settings of a pretraining run."""

    model: Model = Model()
    """The network."""
    objectives: Objectives = Objectives()
    """The losses."""
    data: Data = Data(loader="procedural")
    """The images."""
    optim: Optim = Optim()
    """The optimizer and the teacher."""
    schedule: Schedule = Schedule()
    """The length."""
    parallel: Parallel = Parallel()
    """The processes."""
    output: Output = Output()
    """The results."""

    def __post_init__(self) -> None:
        for kind, specs in self.data.crops.kinds():
            check(
                specs[0].size % self.model.patch_size == 0,
                f"The size of {kind} must be a multiple of Model.patch_size={self.model.patch_size}",
                specs[0].size,
                "change one of them",
            )
        warmup, epochs = self.optim.warmup_epochs, self.schedule.epochs
        check(
            warmup <= epochs,
            "Optim.warmup_epochs must not exceed Schedule.epochs",
            f"{warmup} of {epochs}",
            "shorten the warm-up",
        )

    def global_batch(self, world: int) -> int:
        """Images of one optimizer step on so many processes."""
        return self.data.batch_per_rank * world * self.parallel.accumulate

    def batch_change(self, saved: Mapping[str, Any], processes: int, world: int) -> str:
        """What it changes that a run, given by its plain values, was saved with another global batch; empty if it was not.

        processes: that saved it. world: that continue it.
        """
        before, now = (
            saved["data"]["batch_per_rank"] * processes * saved["parallel"]["accumulate"],
            self.global_batch(world),
        )
        if before == now:
            return ""
        old, new = saved["optim"]["base_lr"] * before / 256, self.optim.peak_lr(now)
        return (
            f"The global batch was {before} on {processes} processes and is {now} on {world}: the peak learning rate was "
            f"{old:g} and is {new:g}, and an epoch has {before / now:.3g} times as many steps, which the schedules follow; "
            f"to keep both, make Data.batch_per_rank x Parallel.accumulate {before / world:g}."
        )

    def to_dict(self) -> dict:
        """Plain values only, for run.json and checkpoints; an objective's options include the name of their class."""
        plain = asdict(self)
        pairs = zip(self.objectives.options, plain["objectives"]["options"], strict=True)
        plain["objectives"]["options"] = [{"kind": type(options).__name__, **values} for options, values in pairs]
        return plain

    @staticmethod
    def from_dict(plain: dict, source: str = "Run.from_dict") -> Run:
        """The run that `to_dict` described. What is not in it has its default; what no run has is an error."""
        return run_reader(source).read(Run, plain)


def run_reader(source: str) -> Reader:
    """Reads what `Run.to_dict` gives; source: its name in messages."""

    def class_of(kind: type, values: dict, where: str) -> type:
        if kind is not ObjectiveOptions:
            return kind
        name = str(values.pop("kind", "nothing"))
        remedy = nearest(name, list(OBJECTIVES), "register it, or use one of them")
        check(name in OBJECTIVES, f"{where}.kind must be one of {', '.join(OBJECTIVES)}", name, remedy)
        return OBJECTIVES[name]

    return Reader(source, class_of)
