"""`python -m bench ops|step|update|loader|evaluation|study` measures; `report` draws; `readme` publishes what is in results/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from . import evaluation, loader, ops, report, step, study, update

OUT = Path("bench/out")


def measure_ops(
    suite: Annotated[ops.Suite, tyro.conf.arg(name="")],
    out: Path = OUT / "ops.csv",
    threads: int = 2,
) -> None:
    """Time every op against its peers and its floor; one CSV row per provider.

    Args:
        suite: what to run.
        out: the CSV to write.
        threads: CPU threads of PyTorch, ours and the peers'.
    """
    torch.set_num_threads(threads)
    rows = ops.run(suite, out)
    ops.show(rows)
    print(f"rows: {out}")


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(
        {
            "ops": measure_ops,
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
