"""Reasons why an implementation cannot run, shared by every op's `unsupported`: dtypes, devices, compilers."""

from __future__ import annotations

import importlib.util
import os
import platform
from functools import cache
from pathlib import Path

import torch

from . import extension

MIN_CAPABILITY = (8, 0)
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # blocks of a launch along x, y and z
LEAST_SHARED = 99 * 1024  # bytes that a block has on the smallest GPU, and where tests run CUDA kernels on a CPU


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


def unsupported_by_all(dtype: torch.dtype, *inputs: torch.Tensor | None) -> str | None:
    """Why only the reference takes these inputs, computed in `dtype`."""
    if dtype == torch.float64:
        return "float64 runs the reference only"
    empty = any(x is not None and x.numel() == 0 for x in inputs)
    return "there is nothing to compute" if empty else None


@cache
def _gpu_too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}; sm_80 or newer is needed"
    return None


def gpu_too_old(tensor: torch.Tensor) -> str | None:
    """Why the tensor's GPU runs none of our kernels."""
    return _gpu_too_old(tensor.device.index)


@cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(tensor: torch.Tensor) -> str | None:
    """The tensor's GPU as compilers name it, "sm_90"; None on a CPU."""
    return _architecture(tensor.device.index) if tensor.is_cuda else None


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
    return extension.missing_function("cuda", function) or _gpu_too_old(tensor.device.index)


def no_cpu_library(tensor: torch.Tensor, function: str) -> str | None:
    """Why the C++ library's `function` cannot take this tensor."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device.type}, not on the CPU"
    reason = extension.missing_function("cpp", function)
    if reason:
        extension.tell_slower(reason)
    return reason


def no_triton(tensor: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take this tensor."""
    if reason := triton_missing():
        return reason
    if tensor.device.type == "cuda":
        return _gpu_too_old(tensor.device.index)
    if tensor.device.type == "cpu" and triton_interpreted():
        return None
    return f"the tensors are on {tensor.device.type}; Triton needs a GPU (or its interpreter: TRITON_INTERPRET=1)"


def too_little_shared_memory(tensor: torch.Tensor, needed: int) -> str | None:
    """Why the tensor's GPU has no room for a block that needs this many bytes."""
    limit = LEAST_SHARED
    if tensor.device.type == "cuda":
        properties = torch.cuda.get_device_properties(tensor.device)
        limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub leaves it out
    return f"its rows need {needed} bytes of shared memory and this GPU has {limit}" if needed > limit else None


def offsets_too_large(values: int) -> str | None:
    """Why a kernel that counts this many values in 32 bits cannot."""
    return f"{values} values overflow its 32-bit offsets" if values >= 2**31 else None


def grid_too_large(*grid: int) -> str | None:
    """Why one launch cannot have this many blocks along x, y and z."""
    for axis, blocks, limit in zip("xyz", grid, GRID_LIMITS, strict=False):
        if blocks > limit:
            return f"one launch would need {blocks} blocks along {axis} and may have {limit}; split the batch"
    return None
