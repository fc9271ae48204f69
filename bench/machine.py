"""Where a number comes from: hardware, versions, commit, date; and what this machine can do at most."""

from __future__ import annotations

import datetime
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from patchlight_kernels.__main__ import processor

from .timing import interleaved

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Provenance:
    """Goes into every row: a number without it is not a number."""

    hardware: str
    threads: int
    torch: str
    triton: str
    commit: str
    date: str

    def columns(self) -> dict:
        return asdict(self)


PROVENANCE = tuple(field.name for field in fields(Provenance))


@cache
def provenance(device: str) -> Provenance:
    hardware = torch.cuda.get_device_name() if device == "cuda" else processor()
    return Provenance(
        hardware,
        torch.get_num_threads(),
        torch.__version__,
        version("triton"),
        commit(),
        datetime.date.today().isoformat(),
    )


def commit() -> str:
    """The commit, with a plus if files that matter differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = git("rev-parse", "--short", "HEAD")
    return (name + "+" if git("status", "--porcelain", "csrc", "kernels", "ssl", "bench/*.py") else name) or "unknown"


@dataclass(frozen=True)
class Ceiling:
    """Measured in the same run: bytes per second of a large copy (read plus write), flops per second of a large product."""

    bandwidth: float
    flops: float


@cache
def ceiling(device: str, dtype: torch.dtype) -> Ceiling:
    """What the floor of a case is computed from."""
    megabytes = 2048 if device == "cuda" else 256
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}, device, seconds=0.5)
    return Ceiling(2 * source.numel() / (times["copy"].p20 / 1e3), 2 * side**3 / (times["product"].p20 / 1e3))
