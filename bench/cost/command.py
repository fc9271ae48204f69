"""`python -m bench cost`: what a training step would cost on a GPU, counted without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from patchlight.usage import POSITIONAL

from ..methods import LARGE, METHODS, OFFICIAL, StepSize
from ..rows import Row, write_rows
from . import pinned
from .count import count_official, count_step
from .hardware import Hardware
from .ranks import COLUMNS as PLAN_COLUMNS
from .ranks import plan, print_plan
from .table import COLUMNS, print_kernels, print_step, rows_of


def measure_cost(
    method: Annotated[Literal["dino", "selfpatch", "ibot", "sere", "dino-sere", "pqcl"] | None, POSITIONAL] = None,
    hardware: str = "h200",
    batch: int = LARGE.batch,
    arch: str = LARGE.arch,
    compiled: bool = False,
    residual: Literal["fp32", "16bit"] = "fp32",
    official: bool = False,
    top: int = 0,
    ranks: tuple[int, ...] = (),
    global_batch: int | None = None,
    update_table: bool = False,
    out: Path = Path("bench/out/cost.csv"),
) -> None:
    """Count a training step's launches, bytes and FLOPs as a GPU would see it, and predict its time.

    Args:
        method: one method; by default all.
        hardware: a file of constants in bench/hardware, without its ending.
        batch: images of a step.
        arch: the backbone.
        compiled: the step as torch.compile makes it, which is what a GPU runs; takes minutes.
        residual: as Parallel.residual.
        official: the official step instead of ours.
        top: list so many operations that take most of the device's time.
        ranks: predict a step on so many GPUs, for example 8 64 512.
        global_batch: with `ranks`, also for this batch divided among the GPUs.
        update_table: instead of this, write anew the committed table that a test compares every step with.
        out: the CSV to write.
    """
    if update_table:
        pinned.update_table()
        print(f"table: {pinned.TABLE}; look at its difference, and commit it")
        return
    constants = Hardware.load(hardware)
    size: StepSize = replace(LARGE, batch=batch, arch=arch)
    form = OFFICIAL if official else "compiled" if compiled else "eager"
    form += ", 16-bit residual" if residual == "16bit" else ""
    rows: list[Row] = []
    for name in [method] if method else METHODS:
        run = METHODS[name].run(size)
        run = replace(run, parallel=replace(run.parallel, residual=residual))
        launches = count_official(METHODS[name].official, run) if official else count_step(run, compiled)
        found = rows_of(name, launches, constants, batch, form)
        print_step(found, launches, batch)
        if top:
            print_kernels(launches, constants, top)
        rows += found
        write_rows(rows, out, COLUMNS)
        if ranks:
            scaled = plan(name, run, ranks, constants, global_batch, compiled)
            print_plan(scaled)
            write_rows(scaled, out.with_stem(f"{out.stem}_ranks_{name}"), PLAN_COLUMNS)
    print(f"rows: {out}")
