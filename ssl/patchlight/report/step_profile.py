"""A profile of some steps: which operations or kernels take the time, and which part of a step does."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..checks import check, sentence
from ..durable import make_folder, move, write_whole
from .console import print_sentence, table_of_names, warn
from .page import MOST_SHOWN
from .run_folder import KERNELS_FILE, PROFILE_FILE, PROFILE_FOLDER, TRACE_FILE

PARTS = ("data", "teacher", "student", "losses", "backward", "update", "replay", "wait")
SKIPPED = 5  # steps of a process before it: three launched ones, the recording of a CUDA graph, its first repetition
_PREFIX = "part: "
_on = False  # whether steps are being recorded: without, a part costs nothing


def part(name: str) -> contextlib.AbstractContextManager:
    """Names a part of a step for a profile that is being recorded. Outside of what is compiled."""
    return record_function(_PREFIX + name) if _on else contextlib.nullcontext()


@dataclass(frozen=True)
class Row:
    """Times of an operation on the CPU, or of a kernel on the GPU, in milliseconds."""

    name: str
    calls: int
    total_ms: float
    self_ms: float
    share: float
    """Of the steps' time, by self_ms."""


@dataclass(frozen=True)
class Summary:
    """What was recorded, and the seconds of its parts; they sum up to `seconds`."""

    first_step: int
    steps: int
    seconds: float
    device: str
    kind: str
    """operation or kernel: what the rows are."""
    parts: dict[str, float]
    note: str


class StepProfile:
    """Makes the steps of a run, some of them under torch's profiler; then writes what it found, and prints the most of it."""

    def __init__(
        self, folder: Path, steps: int, left: int, device: torch.device, rank: int = 0, processes: int = 1
    ) -> None:
        """steps: to record, 0 for none. left: steps that this process will make; an error if they are too few."""
        self.folder, self.steps, self.device, self.processes = Path(folder) / PROFILE_FOLDER, steps, device, processes
        there = self.folder / PROFILE_FILE
        if steps and there.exists() and rank == 0:
            print_sentence(f"Output.profile: {there} is there already; remove {self.folder} to record another one.")
        if there.exists() or not left:
            self.steps = 0
        rule, most = f"Output.profile needs the steps that it records and {SKIPPED} before them", left - SKIPPED
        remedy = f"use at most {most}" if most > 0 else "leave it out"
        check(self.steps <= most or not self.steps, rule, f"{steps} for a run with {left} steps left", remedy)
        if rank > 0:
            self.steps = 0
        self.made = 0
        self.seconds: list[float] = []  # of the recorded steps
        self.profiler: profile | None = None

    def __call__(self, step: Callable[[], Any], number: int) -> None:
        """Makes the step of this number."""
        self.made += 1
        if not SKIPPED < self.made <= SKIPPED + self.steps:
            step()
            return
        if self.profiler is None:
            self._start(number)
        began = time.perf_counter()
        with record_function(f"step {number}"):
            step()
            if self.device.type == "cuda":  # so that what a step does on the GPU belongs to this step
                with part("wait"):
                    torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - began)
        if len(self.seconds) == self.steps:
            self._stop()

    def close(self) -> None:
        """At the end of the training."""
        if self.profiler is not None:
            self._end_recording()
            warn(f"No profile was written: training ended after {len(self.seconds)} of its {self.steps} steps.")

    def _start(self, number: int) -> None:
        global _on
        cuda = self.device.type == "cuda"
        if not cuda:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would complain in the terminal that there is no GPU
        self.profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self.first = number
        if cuda:
            torch.cuda.synchronize(self.device)
        self.profiler.start()
        _on = True

    def _end_recording(self) -> profile:
        global _on
        recorded, self.profiler, _on = self.profiler, None, False
        assert recorded is not None
        recorded.stop()
        return recorded

    def _stop(self) -> None:
        recorded = self._end_recording()
        try:
            summary, rows = summarize(recorded.events(), self.first, self.seconds, self.device)
            self._write(recorded, summary, rows)
        except Exception as error:  # whatever it is, a profile is not worth the run
            warn(sentence(f"A run must be able to write {self.folder}", error, "training goes on without a profile"))
            return
        of = f", of rank 0 of {self.processes}" if self.processes > 1 else ""
        print_summary(summary, rows, f"{self.folder}{of}")

    def _write(self, recorded: profile, summary: Summary, rows: list[Row]) -> None:
        make_folder(self.folder)
        unfinished = self.folder / f".{TRACE_FILE}"
        recorded.export_chrome_trace(str(unfinished))
        move(unfinished, self.folder / TRACE_FILE)
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(Row.__dataclass_fields__)
        table.writerows([r.name, r.calls, f"{r.total_ms:.3f}", f"{r.self_ms:.3f}", f"{r.share:.4f}"] for r in rows)
        write_whole(self.folder / KERNELS_FILE, text.getvalue())
        write_whole(self.folder / PROFILE_FILE, json.dumps(asdict(summary), indent=1))


def summarize(
    events: Iterable[Any], first: int, seconds: list[float], device: torch.device
) -> tuple[Summary, list[Row]]:
    """From the profiler's events: the time of each part, and a row per operation of the steps, or per kernel of the GPU."""
    events, whole = list(events), sum(seconds)
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        name = event.name.removeprefix(_PREFIX)
        if event.name.startswith(_PREFIX) and name in parts and event.device_type == DeviceType.CPU:
            parts[name] += event.time_range.elapsed_us() / 1e6
    parts = {name: value for name, value in parts.items() if value}
    parts["rest"] = whole - sum(parts.values())
    gpu = device.type == "cuda"
    rows = rows_of((_kernels if gpu else _operations)(_of_steps(events)), whole)
    note = ""
    if "replay" in parts:
        note = "The steps repeat one CUDA graph: its kernels are listed as the GPU ran them, and belong to no part."
    elif gpu:
        note = "Parts are the host's time, which launches what the GPU does later; kernels are the GPU's time."
    if gpu and not rows:
        note += " No kernel was seen: the driver may reserve profiling for administrators."
    name = torch.cuda.get_device_name(device) if gpu else "cpu"
    return Summary(first, len(seconds), whole, name, "kernel" if gpu else "operation", parts, note.strip()), rows


def _of_steps(events: list[Any]) -> list[Any]:
    """The events that began within a step, without the names of steps and parts: what is between steps does not count."""
    steps = [e.time_range for e in events if e.name.startswith("step ") and e.device_type == DeviceType.CPU]
    return [
        event
        for event in events
        if not event.name.startswith(("step ", _PREFIX))
        and any(step.start <= event.time_range.start <= step.end for step in steps)
    ]


def _operations(events: list[Any]) -> list[tuple[str, float, float]]:
    """Name, total and self time in microseconds of all operations on the CPU."""
    return [(e.name, e.cpu_time_total, e.self_cpu_time_total) for e in events if e.device_type == DeviceType.CPU]


def _kernels(events: list[Any]) -> list[tuple[str, float, float]]:
    """The same of all kernels and copies on the GPU."""
    found = [event for event in events if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.elapsed_us(), event.time_range.elapsed_us()) for event in found]


def rows_of(times: Iterable[tuple[str, float, float]], seconds: float) -> list[Row]:
    """A row per name, the most expensive first."""
    sums: dict[str, tuple[int, float, float]] = {}
    for name, total, own in times:
        calls, totals, selves = sums.get(name, (0, 0.0, 0.0))
        sums[name] = (calls + 1, totals + total / 1e3, selves + own / 1e3)
    rows = [Row(name, calls, total, own, own / 1e3 / seconds) for name, (calls, total, own) in sums.items()]
    return sorted(rows, key=lambda row: (-row.self_ms, row.name))


def print_summary(summary: Summary, rows: list[Row], place: str) -> None:
    """The parts, and the most expensive rows."""
    console, steps = Console(), summary.steps
    last = summary.first_step + steps - 1
    title = f"Steps {summary.first_step} to {last}: {1000 * summary.seconds / steps:.1f} ms each ({place})"
    parts = [(name, f"{1000 * value / steps:.2f}", f"{value / summary.seconds:.1%}")
             for name, value in summary.parts.items()]  # fmt: skip
    console.print(table_of_names(title, ("part", "ms per step", "share"), parts))
    most = [(r.name, r.calls, f"{r.total_ms / steps:.2f}", f"{r.self_ms / steps:.2f}", f"{r.share:.1%}") for r in rows]
    columns = (summary.kind, "calls", "total ms per step", "self ms per step", "share")
    console.print(table_of_names(f"The most expensive {summary.kind}s", columns, most[:MOST_SHOWN]))
    if summary.note:
        print_sentence(summary.note, console)
