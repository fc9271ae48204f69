"""Which devices and compilers an implementation needs: reasons shared by every op's `unsupported`."""

from __future__ import annotations

import importlib.util
import os
import platform
from functools import cache
from pathlib import Path

import torch

from . import extension

MIN_CAPABILITY = (8, 0)


def processor() -> str:
    """The processor's own name, and the vector extensions that the C++ library picks from."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.machine()
    )
    level = "AVX-512" if " avx512f " in text else "AVX2" if " avx2 " in text else "baseline"
    return f"{model}, {os.cpu_count()} cores, {level}"


@cache
def _gpu_too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; sm_80 or newer is needed"
    return None


@cache
def triton_missing() -> str | None:
    """None if Triton can be imported, else the reason."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"


def triton_interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_cuda_library(tensor: torch.Tensor, function: str) -> str | None:
    """Why the CUDA library's `function` cannot take this tensor."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}, not on a GPU"
    return extension.lacks("cuda", function) or _gpu_too_old(tensor.device.index)


def no_cpu_library(tensor: torch.Tensor, function: str) -> str | None:
    """Why the C++ library's `function` cannot take this tensor."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device.type}, not on the CPU"
    return extension.lacks("cpp", function)


def no_triton(tensor: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take this tensor."""
    if reason := triton_missing():
        return reason
    if tensor.device.type == "cuda":
        return _gpu_too_old(tensor.device.index)
    if tensor.device.type == "cpu" and triton_interpreted():
        return None
    return f"the tensors are on {tensor.device.type}; Triton needs a GPU (or its interpreter: TRITON_INTERPRET=1)"
