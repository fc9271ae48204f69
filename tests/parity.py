"""Runs any implementation of any op, and compares its error with that of PyTorch at the same precision.

On a machine without a GPU, "triton" runs in Triton's interpreter, "cuda" runs the same .cu files on the CPU, and "torch" runs
PyTorch's attention for CPUs in place of the one for GPUs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

from patchlight_kernels import extension, force, hardware
from patchlight_kernels.ops.query_attention import torch_attention
from patchlight_kernels.registry import OpSpec

ROOT = Path(__file__).parent.parent
HAS_GPU = torch.cuda.is_available()
RUNNERS = [("cpu", "reference"), ("cpu", "cpp"), ("cpu", "cuda")] + ([] if HAS_GPU else [("cpu", "triton")])
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]
RUNNERS += [pytest.param("cuda", name, marks=needs_gpu) for name in ("reference", "triton", "cuda")]
TORCH_RUNNERS = [
    ("cpu", "torch"),
    pytest.param("cuda", "torch", marks=needs_gpu),
]  # of ops with a form in PyTorch's kernels
every_runner = pytest.mark.parametrize(("device", "name"), RUNNERS)
EPS = torch.finfo(torch.float32).eps
FLOOR = 8 * EPS  # rounding of the fp32 result itself
DRAWS = 4  # random changes of the inputs by a unit in the last place
SEED = int(os.environ.get("PATCHLIGHT_TEST_SEED", "0"))  # of all random inputs


@cache
def cpu_device_library(sanitizer: str | None = None) -> Path:
    """The CUDA sources built for a CPU; setup.py lets one process compile a file while the others wait."""
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")):
        pytest.skip("no C++ compiler to build the CUDA sources for a CPU")
    target = ROOT / "build" / f"libpatchlight_cpu_device{'_' + sanitizer if sanitizer else ''}.so"
    command = [sys.executable, "setup.py", "-q", "cpu_device", "--output", str(target)]
    result = subprocess.run(
        command + (["--sanitizer", sanitizer] if sanitizer else []), cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@contextlib.contextmanager
def cuda_kernels_on_cpu():
    """Within the block, the implementation "cuda" takes CPU tensors and runs the CUDA kernels on the CPU."""
    torch.ops.load_library(str(cpu_device_library()))
    namespace = torch.ops.patchlight_cpu_device
    with (
        mock.patch.object(extension, "native", lambda function: getattr(namespace, function).default),
        mock.patch.object(hardware, "no_cuda_library", lambda tensor, function: None),
    ):
        yield


@contextlib.contextmanager
def running(device: str, name: str):
    """Within the block, ops on `device` run the implementation `name`; skips where the machine has no library for it."""
    if name == "cpp" and (reason := extension.missing("cpp")):
        pytest.skip(reason)
    if name == "cuda" and device == "cuda" and (reason := extension.missing("cuda")):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        if (device, name) == ("cpu", "cuda"):
            stack.enter_context(cuda_kernels_on_cpu())
        if (device, name) == ("cpu", "torch"):
            stack.enter_context(mock.patch.object(torch_attention, "no_flash_attention", lambda qkv: None))
        stack.enter_context(force(name))
        yield


def reason_against(spec: OpSpec, name: str, arguments: dict) -> str | None:
    """Why the implementation does not take these arguments, or None."""
    args = spec.bind(arguments)
    return next(reason for impl, reason in spec.op.reasons(*args) if impl.name == name)


def widened(arguments: dict) -> dict:
    """The same arguments with floating tensors, and results whose dtype is an argument, in float64."""

    def wide(value):
        if isinstance(value, torch.dtype):
            return torch.float64
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {key: wide(value) for key, value in arguments.items()}


def tensors(output) -> tuple[torch.Tensor, ...]:
    """An op's output as a tuple."""
    return output if isinstance(output, tuple) else (output,)


def outcome(spec: OpSpec, arguments: dict, upstream: torch.Tensor | float = 1.0) -> dict[str, torch.Tensor]:
    """The result of `spec.observe` for the op's output, and the gradients for a fixed random cotangent times `upstream`."""
    if not spec.differentiable:
        return spec.observe(arguments, spec.public(**arguments))
    leaves = {key: arguments[key].detach().requires_grad_() for key in spec.differentiable}
    output = spec.public(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(1)
    parts = [part for part in tensors(output) if part.requires_grad]
    cotangents = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in parts]
    cotangents = [(cotangent * upstream).to(part) for cotangent, part in zip(cotangents, parts, strict=True)]
    gradients = torch.autograd.grad(parts, list(leaves.values()), cotangents)
    named = {f"gradient of {key}": gradient.double() for key, gradient in zip(leaves, gradients, strict=True)}
    with torch.no_grad():
        return spec.observe(arguments, output) | named


def assert_as_exact_as_pytorch(
    spec: OpSpec, arguments: dict, result: dict, label: str, also: dict[str, float] | None = None
) -> None:
    """err(result, float64) <= 2 err(reference at the inputs' dtype, float64) + fp32 rounding, for everything observed.

    PyTorch's error depends on the CPU's order of sums, so it may be small by chance. Then the limit is how far float64 results
    change when fp32 inputs are rounded: `rounding`, or the caller's own number: `also`.
    """
    with force("reference"):
        exact = outcome(spec, widened(arguments))
        pytorch = outcome(spec, arguments)
    assert result.keys() == exact.keys()
    from_rounding = None
    for key, value in result.items():
        assert value.shape == exact[key].shape, (
            f"{label} {key}: {tuple(value.shape)}, expected {tuple(exact[key].shape)}"
        )
        if value.numel() == 0:
            continue
        error = (value - exact[key]).abs().max().item()
        floor = FLOOR * max(1.0, exact[key].abs().max().item())
        allowed = 2 * (pytorch[key] - exact[key]).abs().max().item() + floor
        if error > allowed:
            from_rounding = from_rounding or rounding(spec, arguments, exact)
            known = max(from_rounding[key], (also or {}).get(key, 0.0), last_rounding(arguments, key, exact[key]))
            allowed = max(allowed, 2 * known + floor)
        assert error <= allowed, f"{label} {key}: error {error:.2e}, allowed {allowed:.2e}"


def last_rounding(arguments: dict, key: str, exact: torch.Tensor) -> float:
    """Half a unit in the last place of a gradient or of features ("out"), which have their argument's dtype."""
    floating = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    argument = next(iter(floating.values())) if key == "out" else floating.get(key.removeprefix("gradient of "))
    return 0.0 if argument is None else torch.finfo(argument.dtype).eps / 2 * exact.abs().max().item()


def signs(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Plus or minus 1 for each value."""
    return (torch.randint(2, x.shape, generator=generator, dtype=torch.float64) * 2 - 1).to(x.device)


def moved(arguments: dict, generator: torch.Generator) -> dict:
    """The same arguments with floating tensors off by a unit in the last place of fp32, up or down at random."""

    def move(value):
        is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value * (1 + EPS * signs(value, generator)) if is_number else value

    return {key: move(value) for key, value in arguments.items()}


def spread(function: Callable[[dict], tuple[torch.Tensor, ...]], arguments: dict) -> list[float]:
    """How far each result of `function` in float64 moves, at most, when its arguments are rounded differently in fp32."""
    generator, wide = torch.Generator().manual_seed(1), widened(arguments)
    with force("reference"):
        exact = function(wide)
        draws = [function(moved(wide, generator)) for _ in range(DRAWS)]
    return [max((draw[i] - x).abs().max().item() for draw in draws) for i, x in enumerate(exact)]


def rounding(spec: OpSpec, arguments: dict, exact: dict) -> dict[str, float]:
    """How far the float64 outcome moves, at most, when values read from memory as fp32 move by a unit in the last place.

    That is every input, up or down at random, and the log-sum-exp that a backward reads: a change of it by d changes all
    weights of its row by the factor 1 + d, as the same change of the row's upstream gradient would.
    Ops without a gradient select, or read codes and thresholds: for them such a change is more than rounding.
    """
    generator = torch.Generator().manual_seed(1)
    found = {key: 0.0 for key, value in exact.items() if value.numel()}
    if not spec.differentiable:
        return found
    with force("reference"):
        wide = widened(arguments)
        saved = spec.saved_sums(wide) if spec.saved_sums else None
        for _ in range(DRAWS):
            upstream = 1.0 if saved is None else (1 + EPS * saved.abs() * signs(saved, generator)).cpu()
            draw = outcome(spec, moved(wide, generator), upstream)
            found = {key: max(most, (draw[key] - exact[key]).abs().max().item()) for key, most in found.items()}
    return found
