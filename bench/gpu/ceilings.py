"""What the GPU does at most: a large copy, and products at the shapes of a ViT-S step and of the prototypes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..methods import LARGE
from ..rows import PROVENANCE, Row, provenance, write_rows
from ..timing import time_interleaved

COLUMNS = ("case", "rate", "unit", "median_ms", *PROVENANCE)
WIDTH, HIDDEN = 384, 1536  # of ViT-S
TOKENS = LARGE.batch * (2 * 197 + 8 * 37)
LAYERS = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
PROTOTYPES = {"CLS B64": (640, 256, 65536), "patches iBOT": (12672, 256, 8192), "patches SelfPatch": (43520, 256, 4096)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def cases(device: str) -> Iterator[tuple[str, float, str, Callable[[], object]]]:
    """Name, work, unit of the work per millisecond, and what does it."""
    source = torch.empty(2**31 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield "copy", 2 * source.numel() / 1e9, "TB/s", lambda: target.copy_(source)
    yield product("square bf16", 8192, 8192, 8192, "bf16", device)
    for name, (k, n) in LAYERS.items():
        yield product(f"{name} bf16", TOKENS, k, n, "bf16", device)
    for name, (k, n) in LAYERS.items():
        yield product(f"{name}, weight gradient bf16", n, TOKENS, k, "bf16", device)
    for name, (m, k, n) in PROTOTYPES.items():
        for dtype in DTYPES:
            yield product(f"prototypes {name} {dtype}", m, k, n, dtype, device)


def product(name: str, m: int, k: int, n: int, dtype: str, device: str) -> tuple[str, float, str, Callable]:
    """[m, k] by [k, n]; in fp16 with results in fp32, as our op multiplies."""
    if device == "cpu":  # to try the program
        m, k, n = m // 64, k // 8, n // 64
    # A weight gradient's first factor lies transposed in memory, a weight too.
    a = torch.randn(k, m, device=device).to(DTYPES[dtype]).T if "gradient" in name else torch.randn(
        m, k, device=device
    ).to(DTYPES[dtype])  # fmt: skip
    b = torch.randn(n, k, device=device).to(DTYPES[dtype])
    b = b.T.contiguous() if "gradient" in name else b.T

    def run() -> object:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        return torch.mm(a, b, out_dtype=torch.float32) if dtype == "fp16" and device == "cuda" else a @ b

    return f"{name} [{m} x {k}] [{k} x {n}]", 2 * m * k * n / 1e9, "TFLOP/s", run


def main() -> None:
    folder, device = Path(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for name, work, unit, call in cases(device):
        timing = time_interleaved({name: [call]}, device, seconds=0.1 if device == "cuda" else 0.0)[name]
        rate = f"{work / timing.median:.4g}"
        rows.append({"case": name, "rate": rate, "unit": unit, "median_ms": timing.median, **provenance(device)})
        write_rows(rows, folder / "ceilings.csv", COLUMNS)
        print(f"{name}: {timing.median:.4g} ms, {rate} {unit}", flush=True)


if __name__ == "__main__":
    main()
