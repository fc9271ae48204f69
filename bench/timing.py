"""Fair timing of several calls in one process: interleaved rounds, inputs that are not in a cache, medians."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds over all rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def summarize(milliseconds: Sequence[float]) -> Timing:
    ordered = sorted(milliseconds)
    quantile = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return Timing(statistics.median(ordered), quantile(0.2), quantile(0.8), len(ordered))


def time_interleaved(calls: Mapping[str, Sequence[Callable]], device: str, seconds: float = 2.0) -> dict[str, Timing]:
    """Times every provider in turn, round after round, until each had about `seconds` and at least 10 rounds.

    A provider is a list of the same call over different copies of the inputs, together larger than the last-level
    cache; each round takes the next copy. On a GPU a call is captured as a CUDA graph where it can be, so that
    Python's launch cost is not part of an op's time; events time the replay.
    """
    runner = _gpu_runner if device == "cuda" else _cpu_runner
    runners = {name: [runner(call) for call in copies] for name, copies in calls.items()}
    spent = dict.fromkeys(runners, 0.0)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for copies in runners.values():
        for run in copies:
            run()
    turn = 0
    while any(spent[name] < seconds or len(times[name]) < 10 for name in runners):
        for name, copies in runners.items():
            if spent[name] >= seconds and len(times[name]) >= 10:
                continue
            elapsed = copies[turn % len(copies)]()
            times[name].append(elapsed)
            spent[name] += max(elapsed / 1e3, 1e-4)
        turn += 1
    return {name: summarize(values) for name, values in times.items()}


def measure_calls(calls: Mapping[str, Sequence[Callable]], device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """The columns of each provider's peak memory, measured first, and of its times."""
    memory = {name: peak_extra_bytes(copies[0], device) for name, copies in calls.items()}
    return {
        name: {
            "median_ms": timing.median,
            "p20_ms": timing.p20,
            "p80_ms": timing.p80,
            "rounds": timing.rounds,
            "peak_extra_mb": "" if (extra := memory[name]) is None else extra / 1e6,
        }
        for name, timing in time_interleaved(calls, device, seconds).items()
    }


def check_error(name: str, error: float, tolerance: float) -> None:
    """Ends the program before a wrong result is timed."""
    if error > tolerance:
        raise SystemExit(
            f"{name}: the results must agree within {tolerance:g}, got a difference of {error:.1e}; nothing is timed."
        )


def _cpu_runner(call: Callable) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return run


def _gpu_runner(call: Callable) -> Callable[[], float]:
    replay = _capture(call)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return run


def _capture(call: Callable) -> Callable:
    """The call as a CUDA graph; the call itself if it cannot be captured (it waits for the device, or a library refuses)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:
        print(f"not captured as a CUDA graph, so timed with its launches: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return call
    return graph.replay


def peak_extra_bytes(call: Callable, device: str) -> int | None:
    """The most memory that a call holds beyond what was there before it; None where that cannot be read."""
    if device == "cuda":
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    call()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, so that using it again counts
        Path("/proc/self/clear_refs").write_text("5")  # restart the peak
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
