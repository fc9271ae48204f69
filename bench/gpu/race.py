"""prototype_ce as the trainer calls it, fp32 rows: kernels that multiply, or cuBLAS in pieces of several sizes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from patchlight_kernels import registry
from patchlight_kernels.ops.prototype_ce import pieces

from ..machine import ceiling
from ..ops import TOLERANCE, Forced, copy_inputs, run_backward
from ..peers import PEERS
from ..rows import Row, case_columns, write_rows
from ..timing import measure_calls
from .ops_slice import find_cases

CASES = ("S10-T2-R64-D256-K65536", "S1-T1-R43520-D256-K4096", "S10-T2-R128-D256-K65536", "S1-T1-R12672-D256-K8192")
MEGABYTES = (8, 16, 32, 64, 128)  # of dot products and gradients in memory at a time
MORE_THAN_FP16 = ("fp16x3", "fp32")
OFFICIAL, SMART = "official eager", "smart eager"
SECONDS = 0.2  # for each contestant


def contestants(implementations: tuple[str, ...]) -> Iterator[tuple[str, Callable]]:
    """Name and call: the official mathematics, what our op chooses by itself, and each way that it has."""
    spec, peers = registry.spec("prototype_ce"), PEERS["prototype_ce"]
    yield OFFICIAL, peers[OFFICIAL]
    yield "patchlight", spec.public
    for name in implementations:
        call = Forced(spec, name)
        yield f"patchlight {name} stream", with_settings(call, "stream")
        for megabytes in MEGABYTES:
            yield f"patchlight {name} chunks {megabytes} MB", with_settings(call, "chunks", megabytes << 20)
    for products in MORE_THAN_FP16:
        yield f"patchlight {products}", functools.partial(spec.public, products=products)
    yield SMART, peers[SMART]


def with_settings(call: Callable, way: str, chunk: int = pieces.CHUNK) -> Callable:
    """The call by this way, with pieces of so many bytes."""

    def run(**arguments: Any) -> Any:
        with mock.patch.object(pieces, "WAY", way), mock.patch.object(pieces, "CHUNK", chunk):
            return call(**arguments)

    return run


def race(case: str, device: str, implementations: tuple[str, ...], seconds: float) -> list[Row]:
    """Forward and backward of every contestant whose loss and gradients are right."""
    ((spec, found),) = find_cases([f"prototype_ce:{case}"])
    inputs, top = copy_inputs(spec, found, torch.float32, device), ceiling(device, torch.float16)
    moved, computed = spec.least(found, torch.float32, True)
    floor_ms = max(moved / top.bandwidth, computed / top.flops) * 1e3
    shared = case_columns(spec.name, case, "float32", device, "fwd+bwd") | {"floor_ms": floor_ms}
    calls: dict[str, list[Callable]] = {}
    rows: dict[str, Row] = {}
    truth = results_of(functools.partial(spec.public, products="fp32"), inputs[0])
    for name, call in contestants(implementations):
        rows[name] = shared | {"provider": name} | compare(call, inputs[0], truth)
        if rows[name]["status"] == "ok":
            calls[name] = [functools.partial(run_backward, spec, call, arguments) for arguments in inputs]
    for name, measured in measure_calls(calls, device, seconds).items():
        rows[name] |= measured | {"percent_of_floor": 100 * floor_ms / measured["median_ms"]}
    return list(rows.values())


def results_of(call: Callable, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The loss and both gradients."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("z", "prototypes")}
    loss = call(**{**arguments, **leaves})
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))


def compare(call: Callable, arguments: dict[str, Any], truth: tuple[Tensor, ...]) -> Row:
    """The largest relative error of loss and gradients against products in fp32, which tests hold to float64."""
    try:
        results = results_of(call, arguments)
    except RuntimeError as problem:
        return {"status": f"cannot run: {str(problem).splitlines()[0][:80]}"}
    norm = torch.linalg.vector_norm
    error = max((norm(a - b) / norm(b)).item() for a, b in zip(results, truth, strict=True))
    return {"error": error, "status": "ok" if error <= TOLERANCE else "wrong result, not timed"}


def main() -> None:
    folder, device = Path(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for case in CASES:
        found = race(case, device, ("cuda", "triton"), SECONDS)
        rows += found
        write_rows(rows, folder / "race.csv")
        for row in found:
            result = f"{row['median_ms']:.3f} ms, error {row['error']:.1e}" if row["status"] == "ok" else row["status"]
            print(case, row["provider"], result, flush=True)


if __name__ == "__main__":
    main()
