"""Whether the objectives of a run get what they need from its model, its crops and its batch."""

from __future__ import annotations

from collections.abc import Sequence

from ..backbones.architectures import capabilities_of
from ..needs import Given, check_batch, check_global_batch, check_objectives
from ..objectives.interface import Objective
from ..run import Run


def check_pairing(run: Run, objectives: Sequence[Objective], world: int) -> None:
    """Refuses what cannot work, before anything is built."""
    model, capabilities = run.model, capabilities_of(run.model.arch)
    names = ("Model.summary", "Model.positions", "Data.crops")
    class_token, fixed = model.summary == "cls", model.positions != "learned"
    check_objectives(
        Given(model.arch, capabilities, class_token, fixed, model.summary, run.data.crops, names), objectives
    )
    batch, accumulate = run.data.batch_per_rank, run.parallel.accumulate
    product = f" ({batch} x {world} processes x {accumulate} accumulated)"
    for objective in objectives:
        check_batch(objective.name, objective.needs(), batch, "raise Data.batch_per_rank")
        check_global_batch(objective.name, objective.needs(), run.global_batch(world), product)
