"""Which objectives go with which and with which backbone, asked of the code: `python -m patchlight.recipes.compatibility`.

It prints docs/compatibility.md. A pairing is allowed when a run of it builds; otherwise the error is the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import get_args

from ..data.policy import CropPolicy, CropSpec, dino_policy
from ..engine.branches import build_objective, build_objectives
from ..objectives.dino import DinoOptions
from ..objectives.ibot import IbotOptions
from ..objectives.moby import MobyOptions
from ..objectives.moco_v3 import MocoV3Options
from ..run import Data, Model, Objectives, Optim, Options, Parallel, Run, Schedule

HOSTS = (DinoOptions, IbotOptions, MocoV3Options, MobyOptions)
PLUG_INS = tuple(kind for kind in get_args(Options) if kind not in HOSTS)
SUMMARIES = ("cls", "mean", "class_attention")  # the first that works is taken

# Small enough to be trained in a test; every grid is 4 x 4, and 3 x 3 for local and query crops.
SMALL = {"prototypes": 32, "bottleneck": 8, "hidden": 16, "out": 8, "queue": 16}
BACKBONES = {
    "ViT": Model("vit_tiny", 8, 32, sizes={"width": 16, "depth": 2, "heads": 2}),
    "Swin": Model("swin_tiny", 8, 32, sizes={"stem_width": 4, "depth": 1, "head_width": 4, "window": 4}),
    "ResNet": Model("resnet18", 32, 128, sizes={"stem_width": 4}),
}


@dataclass(frozen=True)
class Pairing:
    """Objectives on a backbone: the small run that works, or the reason why none does."""

    backbone: str
    options: tuple[Options, ...]
    run: Run | None
    reason: str


def pairings() -> list[Pairing]:
    """Every backbone with every host: alone, with each plug-in, and with all of them."""
    return [
        pairing(backbone, (host, *plug_ins)) for backbone in BACKBONES for host in HOSTS for plug_ins in _plug_in_sets()
    ]


def pairing(backbone: str, kinds: tuple[type, ...]) -> Pairing:
    """Tries the summaries one by one."""
    options, reason = tuple(_small(kind) for kind in kinds), ""
    for summary in SUMMARIES:
        model = replace(BACKBONES[backbone], summary=summary, drop_path=0.0)
        run = Run(
            model,
            Objectives(options),
            Data(loader="procedural", crops=_crops(model), batch_per_rank=4, workers=0, procedural_images=8),
            Optim(warmup_epochs=0, freeze_prototypes_epochs=0),
            Schedule(epochs=1, steps_per_epoch=2),
            Parallel(precision="fp32"),
        )
        try:
            build_objectives(run)
        except ValueError as error:
            reason = str(error)
        else:
            return Pairing(backbone, options, run, "")
    return Pairing(backbone, options, None, reason)


def page() -> str:
    """docs/compatibility.md."""
    found = {(one.backbone, tuple(type(o) for o in one.options)): one for one in pairings()}
    reasons: list[str] = []
    lines = [
        "# What goes with what",
        "",
        "Printed by `python -m patchlight.recipes.compatibility`; a test compares this page with the code and trains every",
        "pairing that is allowed. A word is the `Model.summary` that a pairing was built with, the first that works of",
        f"{', '.join(SUMMARIES)}; a number is a reason below.",
    ]
    for backbone in BACKBONES:
        head = ["", *(" + ".join(_name(kind) for kind in kinds) or "alone" for kinds in _plug_in_sets())]
        lines += ["", f"## {backbone}", "", _row(head), _row(["---"] * len(head))]
        for host in HOSTS:
            cells = [_cell(found[backbone, (host, *kinds)], reasons) for kinds in _plug_in_sets()]
            lines.append(_row([_name(host), *cells]))
    lines += ["", "## Why not", "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def _cell(one: Pairing, reasons: list[str]) -> str:
    if one.run is not None:
        return one.run.model.summary
    if one.reason not in reasons:
        reasons.append(one.reason)
    return f"no ({reasons.index(one.reason) + 1})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plug_in_sets() -> list[tuple[type, ...]]:
    return [(), *((kind,) for kind in PLUG_INS), PLUG_INS]


def _name(kind: type) -> str:
    """As in the names of its loss terms."""
    return build_objective(_small(kind), Run()).name


def _small(kind: type) -> Options:
    names = {field.name for field in fields(kind)}
    return kind(**{name: size for name, size in SMALL.items() if name in names})


def _crops(model: Model) -> CropPolicy:
    """Every kind of crop that an objective may ask for."""
    side = 3 * model.patch_size
    policy = dino_policy(2, model.image_size, side)
    return replace(policy, query_crops=(CropSpec(1, side, (0.05, 0.4), flip=0.0),))


if __name__ == "__main__":
    print(page(), end="")
