"""The table that a run prints first: the numbers that depend on the batch, and how they are computed."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..records import Clock
from ..report.console import table_of_names
from ..run import Run
from .schedules import warmup_steps


def settings_table(
    run: Run, clock: Clock, world: int, dataset_size: int, choices: Mapping[str, tuple[str, str]]
) -> Table:
    """Name, value and origin of each number."""
    optim, accumulate, per_rank = run.optim, run.parallel.accumulate, run.data.batch_per_rank
    batch = run.global_batch(world)
    lr = f"{optim.base_lr:g}"
    rows: list[tuple[str, object, str]] = [
        *((name, value, why) for name, (value, why) in choices.items()),
        ("global batch", batch, f"{per_rank} x {world} processes x {accumulate} accumulated"),
        ("steps per epoch", clock.steps_per_epoch, f"{dataset_size} images"),
        ("steps", clock.total, f"{run.schedule.epochs} epochs"),
        ("base learning rate", lr, "per 256 images"),
        ("effective learning rate", f"{optim.peak_lr(batch):g}", f"linear rule: {lr} x {batch} / 256"),
        (
            "warm-up",
            f"{warmup_steps(clock, optim)} steps",
            f"{optim.warmup_epochs:g} epochs, then a cosine to {optim.min_lr:g}",
        ),
        ("weight decay", f"{optim.weight_decay:g}", f"a cosine to {optim.weight_decay_end:g}"),
        ("teacher momentum", f"{optim.teacher_momentum:g}", f"a cosine to {optim.teacher_momentum_end:g}"),
    ]
    if clock.step:
        rows.append(("resumed at step", clock.step, f"{clock.images_seen} images so far"))
    return table_of_names(f"{run.model.arch}/{run.model.patch_size}", ("", "value", "from"), rows)
