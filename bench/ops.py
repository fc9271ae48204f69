"""The op suite: every implementation that runs here and every peer; each result is checked before it is timed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import Progress

from patchlight.usage import FLAT
from patchlight_kernels import force, registry
from patchlight_kernels.registry import Case, OpSpec

from .console import print_op_rows
from .machine import ceiling
from .peers import PEERS
from .rows import Row, case_columns, write_rows
from .timing import measure_calls

TOLERANCE = 1e-2  # a provider whose error against float64 exceeds this is not timed; the tests hold the tight bounds
CACHE_BYTES = {"cuda": 128 * 2**20, "cpu": 64 * 2**20}  # copies of the inputs add up to more than this


@dataclass(frozen=True)
class OpSuite:
    """What to run."""

    ops: tuple[str, ...] = ()
    """Only these operations; by default all."""
    small: bool = False
    """The cases that a laptop finishes; always on a CPU."""
    dtype: str | None = None
    """Of the inputs; by default bfloat16 on a GPU and float32 elsewhere."""
    seconds: float = 2.0
    """For each provider of a case."""


def measure_ops(
    suite: Annotated[OpSuite, FLAT] = OpSuite(),
    out: Path = Path("bench/out/ops.csv"),
    threads: int = 2,
) -> None:
    """Time every op against its peers and its floor; one CSV row per provider.

    Args:
        suite: what to run.
        out: the CSV to write.
        threads: CPU threads of PyTorch, ours and the peers'.
    """
    torch.set_num_threads(threads)
    print_op_rows(measure(suite, out))
    print(f"rows: {out}")


def measure(suite: OpSuite, out: Path) -> list[Row]:
    """Runs the suite on this machine's GPU if it has one, else on its CPU; writes and returns the rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, suite.dtype) if suite.dtype else (torch.bfloat16 if device == "cuda" else torch.float32)
    specs = [spec for spec in registry.specs() if not suite.ops or spec.name in suite.ops]
    jobs = [
        (spec, case) for spec in specs for case in spec.benches if case.small or not (suite.small or device == "cpu")
    ]
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for spec, case in jobs:
            progress.update(task, description=f"{spec.name} {case}")
            rows += measure_case(spec, case, dtype, device, suite.seconds)
            write_rows(rows, out)
            progress.advance(task)
    return rows


def measure_case(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    """The rows of one case: forward, and forward with backward where there is one."""
    inputs = copy_inputs(spec, case, dtype, device)
    providers, top = find_providers(spec, inputs[0]), ceiling(device, dtype)
    rows: list[Row] = []
    for mode in ("fwd", "fwd+bwd") if spec.differentiable else ("fwd",):
        moved, computed = spec.least(case, dtype, mode == "fwd+bwd")
        floor_ms = max(moved / top.bandwidth, computed / top.flops) * 1e3
        shared = case_columns(spec.name, str(case), str(dtype).removeprefix("torch."), device, mode)
        shared["floor_ms"] = floor_ms
        by_provider = {
            name: shared | {"provider": name} | check_result(spec, call, inputs[0]) for name, call in providers.items()
        }
        run = run_backward if mode == "fwd+bwd" else run_forward
        calls = {
            name: [functools.partial(run, spec, providers[name], arguments) for arguments in inputs]
            for name, row in by_provider.items()
            if row["status"] == "ok"
        }
        for name, measured in measure_calls(calls, device, seconds).items():
            median = measured["median_ms"]
            by_provider[name] |= measured | {
                "percent_of_floor": 100 * floor_ms / median,
                "gb_per_s": moved / median / 1e6,
                "tflop_per_s": computed / median / 1e9,
            }
        rows += by_provider.values()
    return rows


def copy_inputs(spec: OpSpec, case: Case, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """So many sets of inputs that none is still in a cache when it is used again."""
    first = spec.inputs(case, dtype, device)
    tensors = [value for value in first.values() if isinstance(value, torch.Tensor)]
    count = min(16, 2 + CACHE_BYTES[device] // max(1, sum(t.numel() * t.element_size() for t in tensors)))
    clone = lambda value: value.clone() if isinstance(value, torch.Tensor) else value
    return [first] + [{key: clone(value) for key, value in first.items()} for _ in range(count - 1)]


def find_providers(spec: OpSpec, arguments: dict[str, Any]) -> dict[str, Callable]:
    """The peers, and each implementation that supports these arguments."""
    raw = spec.bind(arguments)
    found = dict(PEERS.get(spec.name, {}))  # a new op has none
    for impl, reason in spec.op.reasons(*raw):
        if reason is None and impl.name != "reference":
            found[f"patchlight {impl.name}"] = Forced(spec, impl.name)
    return found


@dataclass(frozen=True)
class Forced:
    """The op by the implementation of this name."""

    spec: OpSpec
    name: str

    def __call__(self, **arguments: Any) -> Any:
        with force(self.name):
            return self.spec.public(**arguments)


def run_forward(spec: OpSpec, call: Callable, arguments: dict[str, Any]) -> None:
    with torch.no_grad():
        call(**arguments)


def run_backward(spec: OpSpec, call: Callable, arguments: dict[str, Any]) -> None:
    """The call, and the gradients of everything differentiable; what is forced is forced in the backward too."""
    leaves = {key: arguments[key].detach().requires_grad_() for key in spec.differentiable}
    output = call(**{**arguments, **leaves})
    parts = [p for p in (output if isinstance(output, tuple) else (output,)) if p.requires_grad]
    with force(call.name) if isinstance(call, Forced) else contextlib.nullcontext():
        torch.autograd.grad(parts, list(leaves.values()), [torch.ones_like(p) for p in parts])


def check_result(spec: OpSpec, call: Callable, arguments: dict[str, Any]) -> Row:
    """Whether a provider may be timed: its error against float64, or why it cannot run."""
    try:
        with torch.no_grad():
            error = largest_error(spec, arguments, call(**arguments))
    except RuntimeError as problem:  # also of what is not implemented, and out of memory
        return {"status": f"cannot run: {str(problem).splitlines()[0][:80]}"}
    return {"error": error, "status": "ok" if error <= TOLERANCE else "wrong result, not timed"}


def largest_error(spec: OpSpec, arguments: dict[str, Any], output: Any) -> float:
    """The largest difference of what the op's spec compares from the reference in float64 on the CPU."""
    arguments, output = spec.sample(arguments, output)
    on_cpu = lambda value: value.cpu() if isinstance(value, torch.Tensor) else value
    arguments = {key: on_cpu(value) for key, value in arguments.items()}
    output = tuple(map(on_cpu, output)) if isinstance(output, tuple) else on_cpu(output)
    exact_arguments = {key: to_float64(value) for key, value in arguments.items()}
    with force("reference"):
        exact = spec.observe(exact_arguments, spec.public(**exact_arguments))
    ours = spec.observe(arguments, output)
    return max((ours[key] - exact[key]).abs().max().item() / max(1.0, exact[key].abs().max().item()) for key in exact)


def to_float64(value: Any) -> Any:
    """An argument in float64: a floating tensor, or the dtype of the result."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
