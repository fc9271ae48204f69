"""`python -m bench ops|step|update|loader|evaluation|study` measures; `report` draws; `readme` publishes bench/results."""

from __future__ import annotations

import sys

import tyro

from . import evaluation, loader, ops, report, step, study, update


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {
            "ops": ops.measure_ops,
            "step": step.measure_step,
            "update": update.measure_update,
            "loader": loader.measure_loader,
            "evaluation": evaluation.measure_evaluation,
            "study": study.measure_study,
            "study-report": study.draw,
            "report": report.draw,
            "readme": report.publish,
        },
        prog="python -m bench",
        args=sys.argv[1:],
    )


if __name__ == "__main__":
    main()
