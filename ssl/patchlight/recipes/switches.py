"""A run with other objectives, or with another number of local crops: what `--with`, `--without` and `--data.local-count` do.

What an objective needs in its paper comes and goes with it: weights, crops, masks, positions, the summary of an image.
Rates, epochs and all else stay those of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..checks import check, check_number
from ..data.masking import FixedMasks, MaskRule
from ..data.policy import CropPolicy, CropSpec, dino_policy, pqcl_policy
from ..objectives import (
    OBJECTIVES,
    DinoOptions,
    IbotOptions,
    MobyOptions,
    MocoV3Options,
    ObjectiveOptions,
    SelfPatchOptions,
)
from ..objectives.interface import BuildContext, Objective
from ..objectives.sere import sere_weights
from ..objectives.weighted import check_weights
from ..run import Run
from ..values import nearest

# The others are added to one of these, and come after it.
HOSTS = (DinoOptions, IbotOptions, MocoV3Options, MobyOptions)
WARM: dict[str, Any] = {"warmup_teacher_temperature": 0.04, "teacher_temperature": 0.07, "warmup_epochs": 30}
SELFPATCH_WEIGHT = 0.1  # SelfPatch, Eq. (8)
HALF_MASKED = MaskRule(ratios=((0.0, 0.0), (0.3, 0.2)))  # iBOT's published rule, which PQCL calls 0.3
SERE_SHARES, SERE_IBOT_SHARES = (1.0, 1.0), (0.2, 0.5)  # alpha and beta (SERE, 4.1), by default and beside iBOT
SMALL, LARGE = 96, 224  # pixels of local and query crops beside those of global crops, in all papers


def with_objectives(run: Run, *names: str, without: Sequence[str] = ()) -> Run:
    """The run with the objectives of these names, and without others: `with_objectives(run, "ibot", without=["dino"])`.

    A new objective has its default options. SelfPatch has its host's temperatures, or those of its paper.
    """
    known, present = registered(), {part.name: part for part in parts_of(run)}
    for name in without:
        rule, remedy = "--without takes objectives of the run", nearest(name, present, f"it has {', '.join(present)}")
        check(name in present, rule, name, remedy)
    kept = [options for options, name in zip(run.objectives.options, present, strict=True) if name not in without]
    for number, name in enumerate(names):
        rule, remedy = "--with takes objectives", nearest(name, known, f"there are {', '.join(known)}")
        check(name in known, rule, name, remedy)
        twice = known[name] in map(type, kept) or name in names[:number]
        check(not twice, "--with takes what a run does not have", name, "leave it out, or name it after --without too")
    options = [*kept, *(known[name]() for name in names)]
    rule, got = "A run needs at least one objective", f"--without {' '.join(without)}"
    check(len(options) > 0, rule, got, "name another one after --with")
    weights = _weights_without(run, without)
    ordered = tuple(sorted(options, key=lambda given: type(given) not in HOSTS))
    run = replace(run, objectives=replace(run.objectives, options=ordered, weights=weights))
    for name in without:
        run = _LEAVES.get(name, _unchanged)(run)
    for name in sorted(names, key=lambda name: name == "sere"):  # the last: it rescales the weights of the others
        run = _COMES.get(name, _unchanged)(run)
    return run


def with_local_crops(run: Run, count: int) -> Run:
    """The run with so many local crops by its own rule, else by DINO's: small ones, whose areas end where those of the
    global crops begin. SelfPatch is over local crops where there are some."""
    check_number("--data.local-count", count, "[0, inf)", "0 is for no local crops", whole=True)
    crops = run.data.crops
    rules = crops.local_crops
    got, remedy = f"{len(rules)} rules", "change them by --data.crops.local-crops.0.count and so on"
    check(len(rules) < 2 or count == 0, "--data.local-count needs a run with one rule for local crops", got, remedy)
    if bool(rules) != (count > 0):
        run = _seeing_local(run, count > 0)
    if count == 0:
        return _with_crops(run, replace(crops, local_crops=()))
    if not rules:
        scale = 0.05, min(spec.scale[0] for spec in crops.global_crops)
        rules = dino_policy(count, local_size=small_size(run), local_scale=scale).local_crops
    return _with_crops(run, replace(crops, local_crops=(replace(rules[0], count=count),)))


def _seeing_local(run: Run, local: bool) -> Run:
    options = tuple(
        replace(given, teacher_sees_local=local) if isinstance(given, SelfPatchOptions) else given
        for given in run.objectives.options
    )
    return replace(run, objectives=replace(run.objectives, options=options))


def registered() -> dict[str, type[ObjectiveOptions]]:
    """The registered objectives by name: the options of each."""
    return {_part(kind(), (DinoOptions(), kind())).name: kind for kind in OBJECTIVES.values()}


def parts_of(run: Run) -> list[Objective]:
    """The objectives of a run, to ask for names and needs: they are built for no network."""
    return [
        _part(options, run.objectives.options, bool(run.data.crops.local_crops)) for options in run.objectives.options
    ]


def check_terms(run: Run) -> None:
    """Refuses weights of loss terms that the run does not have, where its objectives name theirs."""
    parts = parts_of(run)
    if all(part.terms for part in parts):
        check_weights(run.objectives.weights, [term for part in parts for term in part.terms])


def small_size(run: Run) -> int:
    """The side of a small crop: that of the local crops, else 96 where global crops have 224 pixels, in whole patches."""
    crops, patch = run.data.crops, run.model.patch_size
    if crops.local_crops:
        return crops.local_crops[0].size
    return max(1, round(crops.global_crops[0].size * SMALL / LARGE / patch)) * patch


def _part(options: ObjectiveOptions, all_options: tuple[ObjectiveOptions, ...], local_crops: bool = True) -> Objective:
    return options.build(BuildContext(all_options, FixedMasks(), attention_heads=1, local_crops=local_crops))


def _unchanged(run: Run) -> Run:
    return run


def _weights_without(run: Run, names: Sequence[str]) -> dict[str, float]:
    """The weights of the other objectives. Without SERE they are divided by that of the run's first other term, as all of
    them are multiplied by one factor for SERE."""
    weights = run.objectives.weights
    others = {term: weight for term, weight in weights.items() if term.partition("/")[0] not in names}
    if "sere" not in names:
        return others
    terms = [term for part in parts_of(run) if part.name != "sere" for term in part.terms]
    factor = next((weights.get(term, 1.0) for term in terms), 1.0) or 1.0
    divided = {term: float(f"{weight / factor:.12g}") for term, weight in others.items()}
    return {term: weight for term, weight in divided.items() if weight != 1}


def _with_crops(run: Run, crops: CropPolicy) -> Run:
    return replace(run, data=replace(run.data, crops=crops))


def _with_weights(run: Run, weights: dict[str, float]) -> Run:
    return replace(run, objectives=replace(run.objectives, weights=weights))


def _ibot_comes(run: Run) -> Run:
    return replace(run, objectives=replace(run.objectives, masks=HALF_MASKED))


def _ibot_leaves(run: Run) -> Run:
    if any(part.needs().masks for part in parts_of(run)):
        return run
    return replace(run, objectives=replace(run.objectives, masks=MaskRule(), mask_counts="fixed"))


def _selfpatch_comes(run: Run) -> Run:
    """As released, DINO beside it centers over all crops, which its teacher gets in any case."""
    local, temperatures, changed = bool(run.data.crops.local_crops), WARM, list(run.objectives.options)
    for number, options in enumerate(changed):
        if isinstance(options, DinoOptions | IbotOptions):
            temperatures = {name: getattr(options, name) for name in WARM}
        if isinstance(options, DinoOptions) and local:
            changed[number] = replace(options, center_over="all")
    for number, options in enumerate(changed):
        if isinstance(options, SelfPatchOptions):
            changed[number] = replace(options, teacher_sees_local=local, **temperatures)
    run = replace(run, objectives=replace(run.objectives, options=tuple(changed)))
    return _class_attention_comes(_with_weights(run, run.objectives.weights | {"selfpatch/patch": SELFPATCH_WEIGHT}))


def _selfpatch_leaves(run: Run) -> Run:
    options = tuple(
        replace(given, center_over="global") if isinstance(given, DinoOptions) else given
        for given in run.objectives.options
    )
    return _class_attention_leaves(replace(run, objectives=replace(run.objectives, options=options)))


def _contrast_comes(run: Run) -> Run:
    weights = run.objectives.weights | {"selfpatch_contrast/patch": SELFPATCH_WEIGHT}
    return _class_attention_comes(_with_weights(run, weights))


def _class_attention_comes(run: Run) -> Run:
    return replace(run, model=replace(run.model, summary="class_attention"))


def _class_attention_leaves(run: Run) -> Run:
    """The class token again, or the mean where the backbone has none."""
    from ..backbones.architectures import capabilities_of  # timm takes seconds

    if any(part.needs().summary == "class_attention" for part in parts_of(run)):
        return run
    summary = "cls" if "class_token" in capabilities_of(run.model.arch) else "mean"
    return replace(run, model=replace(run.model, summary=summary))


def _pqcl_comes(run: Run) -> Run:
    """Query crops, and fixed positions, which stay when it leaves: they are the network's."""
    query: tuple[CropSpec, ...] = pqcl_policy(query_size=small_size(run)).query_crops
    positions = "sincos" if run.model.positions == "learned" else run.model.positions
    run = replace(run, model=replace(run.model, positions=positions))
    return _with_crops(run, replace(run.data.crops, query_crops=query))


def _pqcl_leaves(run: Run) -> Run:
    return _with_crops(run, replace(run.data.crops, query_crops=()))


def _sere_comes(run: Run) -> Run:
    """alpha, beta, and the others' weights rescaled as released."""
    terms = [term for part in parts_of(run) if part.name != "sere" for term in part.terms]
    base = run.objectives.weights | {term: run.objectives.weights.get(term, 1.0) for term in terms}
    beside_ibot = any(isinstance(options, IbotOptions) for options in run.objectives.options)
    return _with_weights(run, sere_weights(base, *(SERE_IBOT_SHARES if beside_ibot else SERE_SHARES)))


_COMES: dict[str, Callable[[Run], Run]] = {
    "ibot": _ibot_comes,
    "selfpatch": _selfpatch_comes,
    "selfpatch_contrast": _contrast_comes,
    "pqcl": _pqcl_comes,
    "sere": _sere_comes,
}
_LEAVES: dict[str, Callable[[Run], Run]] = {
    "ibot": _ibot_leaves,
    "selfpatch": _selfpatch_leaves,
    "selfpatch_contrast": _class_attention_leaves,
    "pqcl": _pqcl_leaves,
}
