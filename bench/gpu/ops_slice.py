"""Chosen cases of the op suite, with those peers only that a rented minute can afford."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from patchlight.usage import call
from patchlight_kernels import registry
from patchlight_kernels.registry import Case, OpSpec

from ..ops import measure_case
from ..peers import PEERS
from ..rows import Row, write_rows

SLOW = ("torchvision per sample",)  # over a second a call on a GPU
COMPILED = ("compile(", "FlexAttention")  # each takes many seconds to compile


def main(
    cases: tuple[str, ...], out: Path, peers: Literal["eager", "compiled"] = "eager", seconds: float = 0.1,
    dtype: str = "bfloat16",
) -> None:  # fmt: skip
    """Time op cases against their peers.

    Args:
        cases: as op:case, in this order.
        out: the CSV to write.
        peers: those that run as they are, or those that must be compiled.
        seconds: for each provider.
        dtype: of the inputs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leave_out(peers == "compiled")
    rows: list[Row] = []
    failed = []
    for spec, case in find_cases(cases):
        began = time.monotonic()
        try:
            found = measure_case(spec, case, getattr(torch, dtype), device, seconds)
        except Exception as error:  # the next case is measured all the same
            traceback.print_exc()
            failed.append(f"{spec.name} {case} failed: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        rows += found
        write_rows(rows, out)
        for row in found:
            result = f"{row['median_ms'] * 1e3:.1f} us" if row["status"] == "ok" else row["status"]
            print(row["op"], row["case"], row["mode"], row["provider"], result)
        print(f"    {time.monotonic() - began:.1f} s", flush=True)
    if failed:
        raise SystemExit("; ".join(failed))


def leave_out(compiled: bool) -> None:
    """Keeps either the compiled peers or the others, and none that is slow."""
    for table in PEERS.values():
        for name in list(table):
            if name in SLOW or name.startswith(COMPILED) != compiled:
                del table[name]


def find_cases(names: Sequence[str]) -> list[tuple[OpSpec, Case]]:
    known = {f"{spec.name}:{case}": (spec, case) for spec in registry.specs() for case in spec.benches}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"ops_slice: cases must be of the op suite, got {', '.join(unknown)}; choose among {', '.join(known)}."
        )
    return [known[name] for name in names]


if __name__ == "__main__":
    call(main, sys.argv[1:], "python -m bench.gpu.ops_slice")
