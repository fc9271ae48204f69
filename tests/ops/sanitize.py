"""Runs the CUDA kernels on CPU threads under a sanitizer: `python tests/ops/sanitize.py thread|address [op ...]`.

Builds the sources with the sanitizer, then runs the cases of those ops, or of all, in a Python with the sanitizer's runtime
preloaded.
The thread sanitizer finds a missing __syncthreads, the address sanitizer an access out of bounds; any report is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RUNTIME = {"thread": "libtsan.so", "address": "libasan.so"}
OPTIONS = {
    # Python and torch are not instrumented: only races between instrumented threads count, and leaks are not reported.
    "thread": {"TSAN_OPTIONS": "exitcode=66 halt_on_error=0 ignore_noninstrumented_modules=1 report_signal_unsafe=0"},
    "address": {"ASAN_OPTIONS": "exitcode=66 detect_leaks=0 halt_on_error=1 verify_asan_link_order=0"},
}


def run_cases(library: str, names: list[str]) -> None:
    """Every small case of the ops in both kinds of precision, compared with the reference."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import parity

    from patchlight_kernels import registry

    torch.set_num_threads(1)
    parity.cpu_device_library = lambda sanitizer=None: Path(library)
    count = 0
    for spec in map(registry.spec, names or registry.names()):
        for case in spec.tests:
            for dtype in (torch.float32, torch.bfloat16):
                arguments = spec.inputs(case, dtype, "cpu")
                with parity.running("cpu", "cuda"):
                    if parity.reason_against(spec, "cuda", arguments):
                        continue
                    result = parity.outcome(spec, arguments)
                parity.assert_as_exact_as_pytorch(spec, arguments, result, f"{spec.name} {case}")
                count += 1
    print(f"{count} cases agree", flush=True)
    os._exit(0)  # the exit code is that of the sanitizer, not of Python's last steps


def main(sanitizer: str, names: list[str]) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from parity import cpu_device_library

    library = cpu_device_library(sanitizer)
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run(
        [compiler, f"-print-file-name={RUNTIME[sanitizer]}"], capture_output=True, text=True, check=True
    )
    environment = {**os.environ, **OPTIONS[sanitizer], "LD_PRELOAD": runtime.stdout.strip(), "OMP_NUM_THREADS": "1"}
    command = [
        "setarch",
        "-R",
        sys.executable,
        __file__,
        "--cases",
        str(library),
        *names,
    ]  # the thread sanitizer needs fixed addresses
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    reports = (result.stdout + result.stderr).count(f"{sanitizer.capitalize()}Sanitizer")
    print(result.stdout + result.stderr)
    if result.returncode or reports or "cases agree" not in result.stdout:
        print(f"{sanitizer} sanitizer: FAILED ({reports} reports, exit {result.returncode})")
        return 1
    print(f"{sanitizer} sanitizer: clean")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--cases":
        run_cases(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
