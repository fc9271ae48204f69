"""The environment of a run: versions, hardware, commit. Numbers are comparable only with them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from patchlight_kernels import __version__

from ..durable import write_whole
from .run_folder import ENVIRONMENT_FILE

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "pillow", "nvidia-dali-cuda130")


def write_environment(folder: Path) -> None:
    """environment.json of a run folder."""
    write_whole(Path(folder) / ENVIRONMENT_FILE, json.dumps(describe_environment(), indent=1))


def describe_environment() -> dict:
    """Versions, hardware, commit and command line as plain values."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {"patchlight": __version__} | {name: found for name in PACKAGES if (found := installed(name))},
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_threads_per_process": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "gpus": [describe_gpu(index) for index in range(torch.cuda.device_count())],
    }


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is checked out at, with a note if files differ from it; None outside of git."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or not (commit := git("rev-parse", "HEAD")):
        return None
    return commit + (" with local changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")


def cpu_name() -> str:
    """The processor's name from Linux, else from Python."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The NVIDIA driver."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def describe_gpu(index: int) -> dict:
    """Name, memory and compute capability."""
    gpu = torch.cuda.get_device_properties(index)
    return {
        "name": gpu.name,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "capability": f"{gpu.major}.{gpu.minor}",
    }


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: by tensors on a GPU, by this process on a CPU. Does not wait for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
