"""Runs the tests as on other machines: `make test-matrix`, or `python tests/matrix.py [row ...]`.

    default, avx2, avx512   ATen, MKL, oneDNN, OpenBLAS and our C++ library limited to one instruction set
    oldest                  the oldest torch and Triton that are supported, in an environment of their own
    newest                  the newest ones that pip finds, likewise
    seeds                   operations, objectives, heads and backbones on the random inputs of seeds 1 to 20

A row that this machine cannot run prints the reason. Logs and environments are in build/matrix; the output ends with a table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build/matrix"
PYTEST = ("-m", "pytest", "-q", "-n", str(len(os.sched_getaffinity(0)) + 1), "--dist", "worksteal")  # as `make test`
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST = tuple(
    re.sub(r">=([\d.]+).*", r"==\1.*", text) for text in PROJECT["dependencies"] if re.match("torch|triton", text)
)
NEWEST = ("--upgrade", "torch", "torchvision", "triton")
SEEDS = range(1, 21)
RANDOM_INPUTS = ("tests/ops", "tests/objectives", "tests/heads", "tests/backbones")
SEEDED = "not compiled_ahead and not cpu_device and not inductor"  # those do not depend on the seed
# By row: the level of our C++ library, the flag in /proc/cpuinfo that it needs, and the settings of the other libraries.
LEVELS = {
    "default": (1, "sse2", {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
                            "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Nehalem"}),
    "avx2": (3, "avx2", {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                         "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}),
    "avx512": (4, "avx512f", {"ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512",
                              "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OPENBLAS_CORETYPE": "SkylakeX"}),
}  # fmt: skip


@dataclass
class Outcome:
    """The result of a row."""

    row: str
    summary: str
    failed: bool
    seconds: float = 0.0
    failed_tests: list[str] = field(default_factory=list)


def run_tests(row: str, *arguments: str, python: str = sys.executable, log: str = "", **environment: str) -> Outcome:
    """Runs pytest in another process; returns its last line and the tests that failed."""
    path, began = FOLDER / f"{log or row}.log", time.perf_counter()
    # Inductor keeps what it compiled for one instruction set and would run it under another. Its own folder cannot have
    # spaces in its name, which ours may.
    environment["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/patchlight-inductor-{os.getuid()}/{row}"
    print(f"{log or row}: running; log in {path.relative_to(ROOT)}", flush=True)
    with open(path, "w") as file:
        command = [python, *PYTEST, *arguments]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=file).returncode
    text = path.read_text()
    counts = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+) in ", text, re.MULTILINE)
    summary = counts[-1].strip() if counts else f"no summary, exit code {code}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    print(f"{log or row}: {summary}", *failed, sep="\n    ", flush=True)
    return Outcome(row, summary, code != 0, time.perf_counter() - began, failed)


def run_instruction_set(row: str) -> Outcome:
    level, flag, environment = LEVELS[row]
    if flag not in Path("/proc/cpuinfo").read_text().split():
        return Outcome(row, f"not run: this CPU has no {flag}", failed=False)
    library = FOLDER / f"level{level}" / "libpatchlight_cpu.so"
    library.parent.mkdir(exist_ok=True)
    build = ["setup.py", "-q", "cpu_level", "--level", str(level), "--output", str(library)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
    return run_tests(row, **environment, PATCHLIGHT_LIBRARIES=str(library.parent))


def run_in_environment(row: str, *packages: str) -> Outcome:
    """Runs all tests in an environment with these packages and the project's other dependencies."""
    home = FOLDER / row
    python, complete = str(home / "bin/python"), home / "complete"  # the file exists once all packages are there
    if not complete.exists():
        print(f"{row}: setting up {home.relative_to(ROOT)} (several gigabytes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    extras = (
        PROJECT["optional-dependencies"][name] for name in ("train", "test", "bench", "tracking", "export", "docs")
    )
    wanted = [*PROJECT["dependencies"], *(package for extra in extras for package in extra)]
    others = [package for package in wanted if not package.startswith("patchlight[")]  # which is on PYTHONPATH
    requirements = (*packages, "setuptools>=77", *others)  # in one call: none may change torch's version
    install = subprocess.run([python, "-m", "pip", "install", "-q", *requirements], capture_output=True, text=True)
    if install.returncode:
        return Outcome(row, f"not run: pip: {install.stderr.strip()[-300:]}", failed=True)
    complete.touch()
    versions = "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    found = subprocess.run([python, "-c", versions], capture_output=True, text=True, check=True).stdout.strip()
    result = run_tests(row, python=python, PYTHONPATH=f"{ROOT / 'kernels'}:{ROOT / 'ssl'}")
    result.summary = f"{found}: {result.summary}"
    return result


def run_seeds(row: str) -> Outcome:
    """Runs the tests once for each seed; a failure names its seed."""
    results = [
        run_tests(row, *RANDOM_INPUTS, "-k", SEEDED, log=f"seed{seed}", PATCHLIGHT_TEST_SEED=str(seed))
        for seed in SEEDS
    ]
    failed = [
        f"seed {seed}: {name}" for seed, result in zip(SEEDS, results, strict=True) for name in result.failed_tests
    ]
    summary = (
        f"{len(results)} seeds, {sum(result.failed for result in results)} with failures; {results[-1].summary} each"
    )
    return Outcome(row, summary, any(r.failed for r in results), sum(r.seconds for r in results), failed)


ROWS: dict[str, Callable[[str], Outcome]] = {
    **dict.fromkeys(LEVELS, run_instruction_set),
    "oldest": lambda row: run_in_environment(row, *OLDEST),
    "newest": lambda row: run_in_environment(row, *NEWEST),
    "seeds": run_seeds,
}


def main(wanted: list[str]) -> int:
    if unknown := set(wanted) - set(ROWS):
        raise SystemExit(f"matrix: rows must be among {list(ROWS)}, got {sorted(unknown)}; without any, all run.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    outcomes = [ROWS[row](row) for row in wanted or ROWS]
    print("\n| row | outcome | minutes |\n| --- | --- | --- |")
    for outcome in outcomes:
        print(f"| {outcome.row} | {outcome.summary} | {outcome.seconds / 60:.1f} |")
        for name in outcome.failed_tests:
            print(f"|  | {name} |  |")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
