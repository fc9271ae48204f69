"""`python -m bench gpu`."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table

from ..console import wide_console
from .plan import PLAN, Part, in_order, pick, sums
from .results import parts_table
from .runner import RESERVE, Runner


def measure_gpu(
    minutes: float = 8.0,
    folder: Path = Path("bench/out/gpu"),
    archive: Path | None = None,
    only: tuple[str, ...] = (),
    plan: bool = False,
) -> None:
    """Measure and test on a rented GPU, the most important first; a second call with the same folder goes on.

    Args:
        minutes: in all, the archive included.
        folder: for outputs, CSVs, profiles and summary.md; compiled kernels are kept beside it.
        archive: of the folder, a .tar.gz, written anew after every part; by default beside the folder.
        only: the names of parts, instead of all.
        plan: print the plan with its limits, and run nothing.
    """
    parts = in_order(pick(PLAN, only))
    print_plan(parts, minutes * 60 - RESERVE)
    if plan:
        return
    if not torch.cuda.is_available():
        raise SystemExit("gpu: this machine must have a CUDA device, got none; see the plan with --plan.")
    folder = folder.resolve()
    runner = Runner(folder, archive or folder.with_name(folder.name + ".tar.gz"), minutes * 60)
    try:
        runner.run(parts, in_order(PLAN))
    finally:
        print("\n".join(parts_table([(part, runner.outcomes.get(part.name)) for part in parts])))
        print(f"summary: {folder / 'summary.md'}\narchive: {runner.archive}")


def print_plan(parts: list[Part], seconds: float) -> None:
    """Each part's limit, the sum of limits so far, and whether it fits if all before it need their limits."""
    title = f"{seconds:.0f} s; a part that does not fit runs in what the others leave of their limits"
    table = Table("part", "importance", "limit", "sum", "", title=title)
    for part, total in zip(parts, sums(parts), strict=True):
        fits = "" if total <= seconds else "dropped if no time is left"
        table.add_row(part.name, str(part.importance), f"{part.seconds} s", f"{total} s", fits)
    wide_console().print(table)
