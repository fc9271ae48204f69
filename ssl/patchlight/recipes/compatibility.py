"""Which objectives work together and on which backbone, by running the checks: `python -m patchlight.recipes.compatibility`.

It prints docs/compatibility.md. A pairing is allowed when a run of it builds; otherwise the error is the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..data.policy import CropSpec, dino_policy
from ..engine.assembly import build_context, build_objectives
from ..objectives import OBJECTIVES, ObjectiveOptions
from ..run import Data, Model, Objectives, Optim, Parallel, Run, Schedule
from .switches import HOSTS

PLUG_INS = tuple(kind for kind in OBJECTIVES.values() if kind not in HOSTS)
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
    options: tuple[ObjectiveOptions, ...]
    run: Run | None
    reason: str


def pairings() -> list[list[Pairing]]:
    """A row per backbone and host: alone, with each plug-in, and with all that work."""
    return [_row_of(backbone, host) for backbone in BACKBONES for host in HOSTS]


def _row_of(backbone: str, host: type) -> list[Pairing]:
    single = {kind: pairing(backbone, (host, kind)) for kind in PLUG_INS}
    works = (kind for kind, result in single.items() if result.run is not None)
    return [pairing(backbone, (host,)), *single.values(), pairing(backbone, (host, *works))]


def pairing(backbone: str, kinds: tuple[type, ...]) -> Pairing:
    """Tries the summaries one by one."""
    options, reason = tuple(_small(kind) for kind in kinds), ""
    for summary in SUMMARIES:
        try:
            run = _small_run(replace(BACKBONES[backbone], summary=summary, drop_path=0.0), options)
            build_objectives(run)
        except ValueError as error:
            reason = str(error)
        else:
            return Pairing(backbone, options, run, "")
    return Pairing(backbone, options, None, reason)


def _small_run(model: Model, options: tuple[ObjectiveOptions, ...]) -> Run:
    """With local crops; for an objective with queries also with query crops, and the fixed positions that they need."""
    side = 3 * model.patch_size
    run = Run(
        model,
        Objectives(options),
        Data(loader="procedural", crops=dino_policy(2, model.image_size, side), batch_per_rank=4, workers=0),
        Optim(warmup_epochs=0, freeze_prototypes_epochs=0),
        Schedule(epochs=1, steps_per_epoch=2),
        Parallel(precision="fp32"),
    )
    context = build_context(run)
    if not any(given.build(context).needs().queries for given in options):
        return run
    crops = replace(run.data.crops, query_crops=(CropSpec(1, side, (0.05, 0.25), flip=0.0),))
    return replace(run, model=replace(model, positions="sincos"), data=replace(run.data, crops=crops))


def page() -> str:
    """docs/compatibility.md."""
    reasons: list[str] = []
    lines = [
        "# What works together",
        "",
        "Printed by `python -m patchlight.recipes.compatibility`; a test compares this page with the code and trains every",
        "pairing that is allowed. An allowed pairing has the `Model.summary` that it was built with, the first that works of",
        f"{', '.join(SUMMARIES)}; the others have the number of a reason below.",
    ]
    heading = ["", "alone", *(f"+ {_name(kind)}" for kind in PLUG_INS), "+ all that work"]
    for row in pairings():
        if type(row[0].options[0]) is HOSTS[0]:
            lines += ["", f"## {row[0].backbone}", "", _line(heading), _line(["---"] * len(heading))]
        lines.append(_line([_name(type(row[0].options[0])), *(_cell(result, reasons) for result in row)]))
    lines += ["", "## Why not", "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def _cell(result: Pairing, reasons: list[str]) -> str:
    if result.run is not None:
        return result.run.model.summary
    if result.reason not in reasons:
        reasons.append(result.reason)
    return f"no ({reasons.index(result.reason) + 1})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(kind: type) -> str:
    """As in the names of its loss terms."""
    return _small(kind).build(build_context(Run())).name


def _small(kind: type) -> ObjectiveOptions:
    names = {field.name for field in fields(kind)}
    return kind(**{name: size for name, size in SMALL.items() if name in names})


if __name__ == "__main__":
    print(page(), end="")
