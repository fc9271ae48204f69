"""Whole training steps on a GPU by wall clock: the official mathematics, the same compiled, and ours in each way it can run.

What is timed is what a run does: `Trainer.step` with its log's numbers, never a graph that a run would not have. Providers are
built, timed and freed one after the other, as several do not fit a GPU at batch 128.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
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


def measure_on_gpu(
    method: Method, size: StepSize, seconds: float, chosen: Sequence[str] = (), profiles: Path | None = None
) -> Iterator[Row]:
    """A row per provider, all or those chosen, in that order; kernel times of each as JSON in the folder of profiles."""
    run = method.run(size)
    case = f"{method.title} {run.model.arch}/{run.model.patch_size} B{size.batch} drop path {run.model.drop_path:g}"
    shared = case_columns("step", case, run.parallel.precision, "cuda", "train")
    launched = replace(run, parallel=replace(run.parallel, **WAYS[f"{OURS} launched"]))  # what is compiled is not seen
    gflop = flops_of(build_trainer(launched).step) / 1e9
    found = providers(method, run)
    for name in chosen or found:
        row = shared | {"provider": name, "status": "ok", "gflop": gflop}
        try:
            measured, kernels = measure_provider(found[name], seconds)
        except Exception as error:  # the next provider is measured all the same
            row["status"] = f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        else:
            row |= measured
            row["images_per_s"] = size.batch / row["median_ms"] * 1e3
            row["mfu"] = gflop * 1e9 / (row["median_ms"] / 1e3) / ceiling("cuda", torch.bfloat16).flops
            if profiles is not None:
                write_kernels(kernels, profiles, f"{case} {name}")
        yield row
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def write_kernels(kernels: dict[str, list[float]], folder: Path, title: str) -> None:
    """As JSON: a kernel's name -> [launches, microseconds], the longest first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "_".join("".join(c if c.isalnum() else " " for c in title).split())
    ordered = dict(sorted(kernels.items(), key=lambda item: -item[1][1]))
    (folder / f"profile_{name}.json").write_text(json.dumps(ordered, indent=0))


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


def measure_provider(build: Callable[[], Callable[[], object]], seconds: float) -> tuple[Row, dict[str, list[float]]]:
    """Times, device time, launches, waits and memory of a step; and its kernels."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = build()
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    ready = time.perf_counter() - began
    timing = time_steps(step, seconds)
    memory = torch.cuda.max_memory_allocated()
    row, kernels = profile_step(step)
    row |= {
        "median_ms": timing.median,
        "p20_ms": timing.p20,
        "p80_ms": timing.p80,
        "rounds": timing.rounds,
        "ready_s": ready,
        "peak_gib": memory / 2**30,
    }
    return row, kernels


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


def profile_step(step: Callable[[], object]) -> tuple[Row, dict[str, list[float]]]:
    """What the device did in a step, and how often the host waited for it; launches and microseconds by kernel."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = list(profiler.events())
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    kernels: dict[str, list[float]] = {}
    for event in on_device:
        launches, microseconds = kernels.get(event.name, (0, 0.0))
        kernels[event.name] = [launches + 1, microseconds + event.device_time]
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
    }, kernels
