"""The whole training step on synthetic crops: official-math eager against ours, same weights, same crops, one process.

A method that extends a host is also compared with its host alone, trained by us: how much longer a step takes, and how many
more FLOPs it needs (counted by the rule in bench/flops.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.table import Table

from patchlight.usage import FLAT

from .console import wide_console
from .flops import flops_of
from .methods import LAPTOP, LARGE, METHODS, OFFICIAL, OURS, Method, StepSize, build_official, build_trainer, last_loss
from .rows import PROVENANCE, TIMED, Row, case_columns, write_rows
from .step_on_gpu import measure_on_gpu
from .timing import check_error, measure_calls

TOLERANCE = 1e-4  # relative, between the losses of the two first steps
HOST, RATIO = "host alone", "over host"
COLUMNS = (*TIMED, "images_per_s", "gflop", "peak_extra_mb", "error", "time_ratio", "flop_ratio", *PROVENANCE)
GPU_COLUMNS = (
    *TIMED, "images_per_s", "mfu", "gflop", "launches", "device_ms", "waits", "peak_gib", "ready_s", *PROVENANCE
)  # fmt: skip


@dataclass(frozen=True)
class StepSuite:
    """The size of the step. The default suits a laptop; `--large`, and always on a GPU: ViT-S/16 with 2 x 224 + 8 x 96 at B64."""

    method: Literal["dino", "selfpatch", "ibot", "sere", "dino-sere", "pqcl"] | None = None
    """One method; by default all, in turn."""
    large: bool = False
    arch: str | None = None
    """vit_base instead of the size's own."""
    batch: int | None = None
    seconds: float = 6.0
    """For each of the steps that are compared, and at least 10 rounds."""
    providers: tuple[str, ...] = ()
    """On a GPU: only these, in this order."""
    profiles: Path | None = None
    """On a GPU: a folder for each provider's kernel times as JSON."""


def measure_step(
    suite: Annotated[StepSuite, FLAT] = StepSuite(),
    out: Path = Path("bench/out/step.csv"),
    threads: int = 2,
) -> None:
    """Time whole training steps against the official mathematics, and plug-ins against their hosts alone.

    Args:
        suite: what to measure.
        out: the CSV to write.
        threads: CPU threads of PyTorch, ours and the official step's.
    """
    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    size = LARGE if suite.large or on_gpu else LAPTOP
    size = replace(size, batch=suite.batch or size.batch, arch=suite.arch or size.arch)
    if on_gpu:
        size = replace(size, drop_path=0.1)  # as the recipes have it
    rows: list[Row] = []
    for name in [suite.method] if suite.method else METHODS:
        if on_gpu:
            found = []
            for row in measure_on_gpu(METHODS[name], size, suite.seconds, suite.providers, suite.profiles):
                found.append(row)
                write_rows([*rows, *found], out, GPU_COLUMNS)  # a step may take minutes to compile
            print_gpu_rows(found)
        else:
            found = measure(METHODS[name], size, suite.seconds)
            print_step_rows(found)
        rows += found
        write_rows(rows, out, GPU_COLUMNS if on_gpu else COLUMNS)
    print(f"rows: {out}")


def measure(method: Method, size: StepSize, seconds: float) -> list[Row]:
    """The rows of one method: the losses are compared first, then FLOPs and memory, then all steps are timed by turns."""
    run = method.run(size)
    trainer = build_trainer(run)
    official = build_official(method.official, trainer)
    views, device = next(trainer.loader), trainer.mesh.device.type

    official_loss = math.nan

    def official_step() -> None:
        nonlocal official_loss
        with torch.autocast(device, torch.bfloat16, enabled=run.parallel.precision == "bf16"):
            official_loss = official.step(views)

    steps: dict[str, Callable[[], None]] = {OFFICIAL: official_step, OURS: trainer.step}
    for step in steps.values():
        step()
    error = abs(last_loss(trainer) - official_loss) / abs(official_loss)
    if run.parallel.precision == "fp32":
        check_error(f"{method.title}: first losses", error, TOLERANCE)
    if method.host is not None:
        steps[HOST] = build_trainer(method.host(size)).step
    case = f"{method.title} {run.model.arch}/{run.model.patch_size} B{size.batch}"
    shared = case_columns("step", case, run.parallel.precision, device, "train")
    rows = {name: shared | {"provider": name, "status": "ok", "gflop": flops_of(steps[name]) / 1e9} for name in steps}
    for name in (OFFICIAL, OURS):
        rows[name]["error"] = error
    for name, measured in measure_calls({name: [step] for name, step in steps.items()}, device, seconds).items():
        rows[name] |= measured | {"images_per_s": size.batch / measured["median_ms"] * 1e3}
    if HOST in rows:
        ratios = {
            "time_ratio": rows[OURS]["median_ms"] / rows[HOST]["median_ms"],
            "flop_ratio": rows[OURS]["gflop"] / rows[HOST]["gflop"],
        }
        rows[RATIO] = shared | {"provider": RATIO, "status": "ratio"} | ratios
    return list(rows.values())


def print_step_rows(rows: list[Row]) -> None:
    """Time, ratio to the official mathematics, throughput, FLOPs and memory; then what the method adds to its host."""
    first = rows[0]
    title = f"{first['case']} {first['dtype']} on {first['hardware']}, {first['threads']} threads"
    columns = ("median ms", "p20 - p80", f"vs {OFFICIAL}", "images/s", "GFLOP", "peak extra MB", "loss error")
    table = Table("provider", *columns, title=title)
    for row in rows:
        if row["status"] == "ratio":
            time, flops = row["time_ratio"], row["flop_ratio"]
            table.caption = (
                f"over its host alone: time {time:.2f}x, FLOPs {flops:.2f}x, time per FLOP {time / flops:.2f}x"
            )
            continue
        memory = row["peak_extra_mb"]
        table.add_row(
            row["provider"], f"{row['median_ms']:.4g}", f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}",
            f"{first['median_ms'] / row['median_ms']:.2f}x", f"{row['images_per_s']:.1f}", f"{row['gflop']:.1f}",
            "" if memory == "" else f"{memory:.0f}", f"{row['error']:.1e}" if "error" in row else "",
        )  # fmt: skip
    wide_console().print(table)


def print_gpu_rows(rows: list[Row]) -> None:
    """Wall clock, device time, launches, waits and memory of each provider."""
    first = next((row for row in rows if row["provider"] == OFFICIAL), rows[0])
    columns = ("ms", f"vs {OFFICIAL}", "images/s", "MFU", "device ms", "launches", "waits", "peak GiB", "ready after s")
    table = Table("provider", *columns, title=f"{first['case']} {first['dtype']} on {first['hardware']}")
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["provider"], row["status"])
            continue
        compared = first["provider"] == OFFICIAL and first["status"] == "ok"
        ratio = f"{first['median_ms'] / row['median_ms']:.2f}x" if compared else ""
        table.add_row(
            row["provider"], f"{row['median_ms']:.1f}", ratio, f"{row['images_per_s']:.0f}", f"{row['mfu']:.0%}",
            f"{row['device_ms']:.1f}", str(row["launches"]), str(row["waits"]), f"{row['peak_gib']:.1f}",
            f"{row['ready_s']:.0f}",
        )  # fmt: skip
    wide_console().print(table)
