"""Which objectives, backbone, summary and crops work together: one rule for each way in which they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..backbones.architectures import ARCHITECTURES, capabilities_of
from ..backbones.interface import CAPABILITIES
from ..objectives.interface import Needs, Objective
from ..run import Run


def check_pairing(run: Run, objectives: Sequence[Objective], world: int) -> None:
    """Refuses what cannot work, before anything is built."""
    needs = [objective.needs() for objective in objectives]
    if run.data.crops.query_crops and not any(need.queries for need in needs):
        raise ValueError(
            "Query crops need an objective that uses them, got query crops but no such objective; add PqclOptions(), or choose "
            "a crop policy without them."
        )
    for objective in objectives:
        for reason in refusals(run, objective.name, objective.needs(), world):
            raise ValueError(reason)


def refusals(run: Run, name: str, needs: Needs, world: int) -> Iterator[str]:
    """A sentence for each need of an objective that this run cannot meet."""
    model, crops, batch = run.model, run.data.crops, run.data.batch_per_rank
    capabilities = capabilities_of(model.arch)
    if model.summary == "cls" and "class_token" not in capabilities:
        yield (
            f"Model.summary='cls' needs a backbone that {CAPABILITIES['class_token']}, got {model.arch}; "
            "use 'mean' or 'class_attention'."
        )
    for capability, what in CAPABILITIES.items():
        if getattr(needs, capability, False) and capability not in capabilities:
            able = sorted(arch for arch in ARCHITECTURES if capability in capabilities_of(arch))
            yield f"{name} needs a backbone that {what}, got {model.arch}; choose from {able}."
    if needs.summary not in (None, model.summary):
        yield (
            f"The objectives need Model.summary={needs.summary!r}, got {model.summary!r}; "
            "set it, or pool neighbors by mean."
        )
    globals_here = sum(spec.count for spec in crops.global_crops)
    if globals_here < needs.global_crops:
        yield f"{name} needs {needs.global_crops} global crops, got {globals_here}; add to Data.crops."
    if needs.local_crops and not crops.local_crops:
        yield (
            "The objectives need local crops, got a crop policy without them; add some, "
            "or give the teacher global crops only."
        )
    if needs.batch_norm and batch < 2:
        yield f"{name} has BatchNorm, which needs 2 images per process, got {batch}; raise Data.batch_per_rank."
    global_batch = run.global_batch(world)
    if needs.batch_divides and needs.batch_divides % global_batch:
        yield (
            f"{name} needs a global batch that divides its queue of {needs.batch_divides}, got {global_batch} "
            f"({batch} x {world} processes x {run.parallel.accumulate} accumulated); change one of them."
        )
    if needs.queries:
        yield from query_refusals(run)


def query_refusals(run: Run) -> Iterator[str]:
    """Query crops must be there and no larger than the global crops, and positions must be fixed."""
    crops = run.data.crops
    if not crops.query_crops:
        yield "The objectives need query crops, got a crop policy without them; use pqcl_policy()."
        return
    if run.model.positions == "learned":
        yield "Queries lie between the patches and need fixed positions, got Model.positions='learned'; set it to 'sincos'."
    size, largest = crops.query_crops[0].size, crops.global_crops[0].size
    if size > largest:
        yield f"Query crops must not be larger than the global crops, got {size} and {largest} pixels; shrink them."
