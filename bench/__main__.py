"""`python -m bench ops|step|update|loader|evaluation|study` measures, `gpu` all on a rented GPU; `cost` counts; `report` draws;
`readme` publishes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from patchlight.usage import call_one_of

from . import creatures, evaluation, loader, ops, report, step, study, tables, update
from .cost import command as cost
from .gpu import command as gpu

COMMANDS: dict[str, Callable] = {
    "ops": ops.measure_ops,
    "step": step.measure_step,
    "update": update.measure_update,
    "loader": loader.measure_loader,
    "evaluation": evaluation.measure_evaluation,
    "study": study.measure_study,
    "study-report": study.draw,
    "study-scenes": creatures.draw_sheet,
    "cost": cost.measure_cost,
    "gpu": gpu.measure_gpu,
    "report": report.draw,
    "readme": tables.publish,
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench") -> None:
    call_one_of(COMMANDS, sys.argv[1:] if arguments is None else list(arguments), prog)


if __name__ == "__main__":
    main()
