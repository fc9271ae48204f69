"""The op suite: every implementation that runs here against every peer, correctness first, rows to CSV."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from patchlight_kernels import force, registry
from patchlight_kernels.registry import Case, OpSpec

from .machine import PROVENANCE, ceiling, provenance
from .peers import PEERS
from .timing import interleaved, peak_extra_bytes

GATE = 1e-2  # a provider whose error against float64 exceeds this is not timed; the tests hold the tight bounds
CACHE_BYTES = {"cuda": 128 * 2**20, "cpu": 64 * 2**20}  # copies of the inputs add up to more than this
TIMED = ("op", "case", "dtype", "device", "mode", "provider", "status", "median_ms", "p20_ms", "p80_ms", "rounds")
COLUMNS = (
    *TIMED, "floor_ms", "percent_of_floor", "gb_per_s", "tflop_per_s", "peak_extra_mb", "error", *PROVENANCE
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """What to run."""

    ops: tuple[str, ...] = ()
    small: bool = False
    dtype: str | None = None
    seconds: float = 2.0


def run(suite: Suite, out: Path) -> list[dict]:
    """Runs the suite on this machine's GPU if it has one, else on its CPU; writes and returns the rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, suite.dtype) if suite.dtype else (torch.bfloat16 if device == "cuda" else torch.float32)
    specs = [spec for spec in registry.specs() if not suite.ops or spec.name in suite.ops]
    jobs = [
        (spec, case) for spec in specs for case in spec.benches if case.small or not (suite.small or device == "cpu")
    ]
    rows: list[dict] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for spec, case in jobs:
            progress.update(task, description=f"{spec.name} {case}")
            rows += one_case(spec, case, dtype, device, suite.seconds)
            write(rows, out)
            progress.advance(task)
    return rows


def providers(spec: OpSpec, arguments: dict) -> dict:
    """Peers, and each implementation that takes these arguments, forced."""
    raw = spec.op.bind(**arguments)
    found = dict(PEERS[spec.name])
    for impl, reason in spec.op.ladder(*raw):
        if reason is None and impl.name != "reference":
            found[f"patchlight {impl.name}"] = functools.partial(forced, spec, impl.name)
    return found


def forced(spec: OpSpec, name: str, **arguments):
    with force(name):
        return spec.public(**arguments)


def copies(spec: OpSpec, case: Case, dtype: torch.dtype, device: str) -> list[dict]:
    """Enough sets of inputs that none is in a cache when its turn comes."""
    first = spec.inputs(case, dtype, device)
    tensors = [value for value in first.values() if isinstance(value, torch.Tensor)]
    count = min(16, 2 + CACHE_BYTES[device] // max(1, sum(t.numel() * t.element_size() for t in tensors)))
    fresh = lambda value: value.clone() if isinstance(value, torch.Tensor) else value
    return [first] + [{key: fresh(value) for key, value in first.items()} for _ in range(count - 1)]


def one_case(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, seconds: float) -> list[dict]:
    """The rows of one case: forward, and forward with backward where there is one."""
    inputs = copies(spec, case, dtype, device)
    chosen, rows = providers(spec, inputs[0]), []
    for mode in ("fwd", "fwd+bwd") if spec.differentiable else ("fwd",):
        base = provenance_of(spec, case, dtype, device, mode)
        found, calls = {}, {}
        for name, call in chosen.items():
            found[name] = base | {"provider": name} | judged(spec, call, inputs[0])
            if found[name]["status"] != "ok":
                continue
            calls[name] = [functools.partial(measured(spec, mode), call, arguments) for arguments in inputs]
            extra = peak_extra_bytes(calls[name][0], device)
            found[name]["peak_extra_mb"] = "" if extra is None else extra / 1e6
        moved, computed = spec.least(case, dtype, mode == "fwd+bwd")
        for name, timing in interleaved(calls, device, seconds).items():
            found[name] |= {
                "median_ms": timing.median,
                "p20_ms": timing.p20,
                "p80_ms": timing.p80,
                "rounds": timing.rounds,
                "percent_of_floor": 100 * base["floor_ms"] / timing.median,
                "gb_per_s": moved / timing.median / 1e6,
                "tflop_per_s": computed / timing.median / 1e9,
            }
        rows += found.values()
    return rows


def provenance_of(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, mode: str) -> dict:
    """What all rows of a case share."""
    top = ceiling(device, dtype)
    moved, computed = spec.least(case, dtype, mode == "fwd+bwd")
    floor = max(moved / top.bandwidth, computed / top.flops)
    return {
        "op": spec.name,
        "case": str(case),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "mode": mode,
        "floor_ms": floor * 1e3,
        **provenance(device).columns(),
    }


def measured(spec: OpSpec, mode: str) -> Callable:
    """What is timed: the call, or the call and the gradients of everything differentiable."""

    def forward(call: Callable, arguments: dict) -> None:
        with torch.no_grad():
            call(**arguments)

    def both(call: Callable, arguments: dict) -> None:
        leaves = {key: arguments[key].detach().requires_grad_() for key in spec.differentiable}
        output = call(**{**arguments, **leaves})
        parts = [p for p in (output if isinstance(output, tuple) else (output,)) if p.requires_grad]
        torch.autograd.grad(parts, list(leaves.values()), [torch.ones_like(p) for p in parts])

    return forward if mode == "fwd" else both


def judged(spec: OpSpec, call: Callable, arguments: dict) -> dict:
    """Whether a provider may be timed: its error against float64, or why it cannot run."""
    try:
        with torch.no_grad():
            found = error(spec, arguments, call(**arguments))
    except (NotImplementedError, torch.OutOfMemoryError, RuntimeError) as problem:
        return {"status": f"cannot run: {str(problem).splitlines()[0][:80]}"}
    return {"error": found, "status": "ok" if found <= GATE else "wrong result, not timed"}


def error(spec: OpSpec, arguments: dict, output) -> float:
    """The largest deviation of what the op's spec observes from the reference in float64 on the CPU."""
    arguments, output = spec.sample(arguments, output)
    on_cpu = lambda value: value.cpu() if isinstance(value, torch.Tensor) else value
    arguments = {key: on_cpu(value) for key, value in arguments.items()}
    output = tuple(map(on_cpu, output)) if isinstance(output, tuple) else on_cpu(output)
    exact_arguments = {key: wide(value) for key, value in arguments.items()}
    with force("reference"):
        exact = spec.observe(exact_arguments, spec.public(**exact_arguments))
    mine = spec.observe(arguments, output)
    return max((mine[key] - exact[key]).abs().max().item() / max(1.0, exact[key].abs().max().item()) for key in exact)


def wide(value):
    """An argument in float64: a floating tensor, or the dtype of the result."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def write(rows: list[dict], out: Path, columns: Sequence[str] = COLUMNS) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def show(rows: list[dict]) -> None:
    """One table per case: time, ratio to the official mathematics, share of the floor, memory."""
    console = Console(width=max(120, Console().width))
    for case in dict.fromkeys((row["op"], row["case"], row["dtype"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["op"], row["case"], row["dtype"], row["mode"]) == case]
        timed = [row for row in chosen if row["status"] == "ok"]
        first = timed[0] if timed else chosen[0]
        title = f"{' '.join(case)} on {first['hardware']}, {first['threads']} threads"
        ratio = f"vs {first['provider']}"
        table = Table("provider", "median ms", "p20 - p80", ratio, "of floor", "peak extra MB", "error", title=title)
        for row in chosen:
            if row["status"] != "ok":
                table.add_row(row["provider"], "-", "", "", "", "", row["status"])
                continue
            memory = row["peak_extra_mb"]
            share = f"{row['percent_of_floor']:.0f} %" if "percent_of_floor" in row else ""
            table.add_row(
                row["provider"], f"{row['median_ms']:.4g}", f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}",
                f"{first['median_ms'] / row['median_ms']:.1f}x", share,
                "" if memory == "" else f"{memory:.2f}", f"{row['error']:.1e}",
            )  # fmt: skip
        console.print(table)
