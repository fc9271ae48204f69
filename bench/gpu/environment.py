"""What this machine is: the driver, versions of packages, cores and memory, and which implementations can run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from .runner import cores

PACKAGES = (
    "torch", "triton", "torchvision", "timm", "numpy", "rich", "pytest", "pytest-xdist", "pytest-timeout",
    "nvidia-dali-cuda130", "nvidia-cudnn-cu13", "nvidia-cublas", "pillow",
)  # fmt: skip
PROGRAMS = ("nvcc", "compute-sanitizer", "ncu", "nsys", "cuobjdump", "g++")
COMMANDS = (["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK,POWER,ECC"], ["nvcc", "--version"], ["uname", "-srm"])


def main() -> None:
    versions = {found.metadata["Name"].lower(): found.version for found in distributions() if found.metadata["Name"]}
    for command in COMMANDS:
        if shutil.which(command[0]):
            print(f"$ {' '.join(command)}", flush=True)
            subprocess.run(command, timeout=10, check=False)
    print(f"cores: {cores()}")
    print(next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")))
    for name in PACKAGES:
        print(f"{name}: {versions.get(name, 'not here')}")
    for name in PROGRAMS:
        print(f"{name}: {shutil.which(name) or 'not here'}")
    doctor = subprocess.run([sys.executable, "-m", "patchlight_kernels", "doctor"], check=False, timeout=60)
    missing = [name for name in ("pytest-xdist", "pytest-timeout", "timm") if name not in versions]
    print(
        f"Python {sys.version.split()[0]}, torch {versions.get('torch')}, triton {versions.get('triton')}, {cores()} cores"
        f"{', missing: ' + ', '.join(missing) if missing else ''}"
    )
    sys.exit(doctor.returncode)


if __name__ == "__main__":
    main()
