"""Whole training steps on a GPU by wall clock: the official mathematics, the same compiled, and ours in each way it can run.

What is timed is what a run does: `Trainer.step` with its log's numbers, never a graph that a run would not have. Providers are
built, timed and freed one after the other, as several do not fit a GPU at batch 128.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from patchlight.run import Run

from .flops import flops_of
from .machine import ceiling
from .methods import OFFICIAL, OURS, Method, StepSize, build_official, build_trainer
from .official_layers import fused_attention
from .rows import Row, case_columns
from .timing import Timing, summarize

OFFICIAL_COMPILED = "official compiled + SDPA"
# Ours: launched from Python, compiled, and compiled as one CUDA graph, which is what a run on a GPU does.
WAYS: dict[str, dict[str, Any]] = {
    f"{OURS} launched": {"graph": "off", "compile": "off"},
    f"{OURS} compiled": {"graph": "off", "compile": "on"},
    OURS: {"graph": "on", "compile": "on"},
}
WARM_UP, STEPS = 6, 5  # steps before the first that counts, and steps between two looks at the clock
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure_on_gpu(method: Method, size: StepSize, seconds: float) -> list[Row]:
    """A row per provider. Losses are compared where no path is dropped, as providers draw other random numbers."""
    run = method.run(size)
    case = f"{method.title} {run.model.arch}/{run.model.patch_size} B{size.batch} drop path {run.model.drop_path:g}"
    shared = case_columns("step", case, run.parallel.precision, "cuda", "train")
    gflop = flops_of(build_trainer(run).step) / 1e9
    rows = []
    for name, build in providers(method, run).items():
        row = shared | {"provider": name, "status": "ok", "gflop": gflop}
        try:
            row |= measure_provider(build, seconds)
        except (RuntimeError, ValueError) as error:
            row["status"] = f"failed: {str(error).splitlines()[0][:120]}"
        else:
            row["images_per_s"] = size.batch / row["median_ms"] * 1e3
            row["mfu"] = gflop * 1e9 / (row["median_ms"] / 1e3) / ceiling("cuda", torch.bfloat16).flops
        rows.append(row)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def providers(method: Method, run: Run) -> dict[str, Callable[[], Callable[[], object]]]:
    """What builds each provider's step."""

    def official(compiled: bool) -> Callable[[], object]:
        trainer = build_trainer(run)
        steps, views = build_official(method.official, trainer), next(trainer.loader)
        if compiled:
            steps.loss = torch.compile(steps.loss, dynamic=False)  # type: ignore[method-assign]

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                if compiled:
                    with fused_attention():
                        steps.step(views)
                else:
                    steps.step(views)

        return step

    def ours(parallel: dict[str, Any]) -> Callable[[], object]:
        return build_trainer(replace(run, parallel=replace(run.parallel, **parallel))).step

    built: dict[str, Callable[[], Callable[[], object]]] = {
        OFFICIAL: lambda: official(False),
        OFFICIAL_COMPILED: lambda: official(True),
    }
    return built | {name: lambda way=way: ours(way) for name, way in WAYS.items()}


def measure_provider(build: Callable[[], Callable[[], object]], seconds: float) -> Row:
    """Times, device time, launches, waits and memory of a step."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = build()
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    ready = time.perf_counter() - began
    timing = time_steps(step, seconds)
    memory = torch.cuda.max_memory_allocated()
    return {
        "median_ms": timing.median,
        "p20_ms": timing.p20,
        "p80_ms": timing.p80,
        "rounds": timing.rounds,
        "ready_s": ready,
        "peak_gib": memory / 2**30,
        **profile_step(step),
    }


def time_steps(step: Callable[[], object], seconds: float) -> Timing:
    """Milliseconds per step by wall clock; the host waits for the device every few steps only, as a run does."""
    times: list[float] = []
    while sum(times) * STEPS < seconds * 1e3 or len(times) < 5:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / STEPS * 1e3)
    return summarize(times)


def profile_step(step: Callable[[], object]) -> Row:
    """What the device did in a step, kernel by kernel, and how often the host waited for it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = list(profiler.events())
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    waits = sum(event.name in WAITS for event in events) - 1  # the last one is ours
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return {
        "launches": len(on_device),
        "device_ms": sum(event.device_time for event in on_device) / 1e3,
        "waits": max(waits, sum("synchroniz" in str(warning.message) for warning in found)),
    }
