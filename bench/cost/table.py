"""What was counted as rows and tables: a row per phase and one for the step."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.table import Table

from ..console import wide_console
from ..rows import Row
from .hardware import Hardware
from .records import FLOP_KINDS, PHASES, WAITS, Kernel, Launch

STEP = "step"  # the row of all phases together
COUNTS = ("launches", "gb", *(f"gflop {kind}" for kind in FLOP_KINDS), "waits")
TIMES = ("device_ms", "wall_launched_ms", "wall_graph_ms", "images_per_s")
COLUMNS = ("method", "hardware", "form", "phase", *COUNTS, *TIMES)


def rows_of(method: str, launches: Sequence[Launch], hardware: Hardware, batch: int, form: str = "eager") -> list[Row]:
    """A row for each phase that launches anything, then the step's, which alone has wall times."""
    rows = []
    for phase, counts in counts_by_phase(launches).items():
        device = hardware.device_ms(launch.kernel for launch in launches if phase in (launch.phase, STEP))
        rows.append(
            {"method": method, "hardware": hardware.name, "form": form, "phase": phase, **counts, "device_ms": device}
        )
    step, number = rows[-1], len(launches)
    step["wall_launched_ms"] = hardware.wall_ms(step["device_ms"], number, graph=False)
    step["wall_graph_ms"] = hardware.wall_ms(step["device_ms"], number, graph=True)
    step["images_per_s"] = batch / step["wall_graph_ms"] * 1e3
    return rows


def counts_by_phase(launches: Sequence[Launch]) -> dict[str, Row]:
    """The counts of each phase that launches anything, and of the step."""
    kernels = {phase: [launch.kernel for launch in launches if launch.phase == phase] for phase in PHASES}
    kernels[STEP] = [launch.kernel for launch in launches]
    return {phase: counts_of(found) for phase, found in kernels.items() if found}


def counts_of(kernels: Sequence[Kernel]) -> Row:
    """What needs no constant of any hardware."""
    flops = {f"gflop {kind}": sum(k.flops for k in kernels if k.flop_kind == kind) / 1e9 for kind in FLOP_KINDS}
    waits = sum(kernel.kind in WAITS for kernel in kernels)
    return {"launches": len(kernels), "gb": sum(k.bytes for k in kernels) / 1e9, "waits": waits, **flops}


def print_step(rows: Sequence[Row], launches: Sequence[Launch], batch: int) -> None:
    """A line per phase; what the whole step takes below."""
    step = rows[-1]
    title = f"{step['method']}, {batch} images, {step['form']}, predicted for {step['hardware']}"
    table = Table("phase", title=title, caption_justify="left")
    for name in ("launches", "GB", *(f"GFLOP {kind}" for kind in FLOP_KINDS), "device ms"):
        table.add_column(name, justify="right")
    for row in rows:
        flops = (f"{row[f'gflop {kind}']:.1f}" for kind in FLOP_KINDS)
        table.add_row(row["phase"], str(row["launches"]), f"{row['gb']:.2f}", *flops, f"{row['device_ms']:.2f}")
    launched, graph = step["wall_launched_ms"], step["wall_graph_ms"]
    table.caption = (
        f"launched one by one: {launched:.1f} ms, {batch / launched * 1e3:.0f} images/s; as one graph: {graph:.1f} ms, "
        f"{batch / graph * 1e3:.0f} images/s; the host waits {step['waits']} times"
    )
    places = Counter(launch.place for launch in launches if launch.kernel.kind in WAITS)
    if places:
        table.caption += ": " + ", ".join(f"{place} ({number})" for place, number in places.items())
    wide_console().print(table)


def print_kernels(launches: Iterable[Launch], hardware: Hardware, count: int) -> None:
    """The operations that take most of the device's time."""
    time: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    number: Counter = Counter()
    moved: Counter = Counter()
    for launch in launches:
        name = launch.phase, launch.kernel.name, launch.kernel.kind
        time[name] += hardware.microseconds(launch.kernel)
        number[name] += 1
        moved[name] += launch.kernel.bytes
    table = Table("phase", "operation", "kind", title="most device time")
    for column in ("launches", "GB", "device ms"):
        table.add_column(column, justify="right")
    for name, microseconds in sorted(time.items(), key=lambda item: -item[1])[:count]:
        table.add_row(*name, str(number[name]), f"{moved[name] / 1e9:.2f}", f"{microseconds / 1e3:.2f}")
    wide_console().print(table)
