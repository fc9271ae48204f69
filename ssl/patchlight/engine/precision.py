"""The number format of a step, which is decided here only.

Parameters, gradients, optimizer, teacher and all communication are fp32; the forward pass runs under autocast, which
rounds the inputs of matrix products, and not norms, softmaxes and the residual stream. FSDP2 gets no precision policy:
with 16-bit shards it would also round the norms' weights, and a sharded run would differ from a run on one process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

CPU_INFO = Path("/proc/cpuinfo")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device, cpu_info: Path = CPU_INFO) -> tuple[str, str]:
    """The format of a run's forward pass, and why."""
    if precision != "auto":
        return precision, f'Parallel.precision="{precision}"'
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bool({"amx_bf16", "avx512_bf16"} & set(cpu_info.read_text().split())) if cpu_info.exists() else False
    vectors = torch.backends.cpu.get_cpu_capability()
    if fast and device.type == "cpu" and vectors != "AVX512":  # its attention in bf16 would be an error
        return "fp32", f"PyTorch multiplies bf16 with AVX512 only, and uses {vectors} here (ATEN_CPU_CAPABILITY)"
    if fast:
        return "bf16", f"this {'GPU' if device.type == 'cuda' else 'CPU'} multiplies bf16"
    return "fp32", f"this {'GPU' if device.type == 'cuda' else 'CPU'} multiplies no bf16; emulated, it is slower"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of every forward pass."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class LossScaler:
    """Scales up the loss, so that small gradients do not become 0 in fp16; non-finite steps lower the scale.

    torch.amp.GradScaler does this too, but decides to skip a step from one rank's gradients; here the engine decides,
    the same on all ranks. Nothing is read on the host.
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device, start: float = 2.0**16) -> None:
        self.scale = torch.full((), start, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale

    def unscale(self, gradients: list[Tensor]) -> None:
        torch._foreach_mul_(gradients, self.scale.reciprocal())

    def update(self, refused: Tensor) -> None:
        """Halves the scale after a refused step (refused is 0 or 1, fp32), doubles it after 2000 good ones."""
        torch._amp_update_scale_(self.scale, self.good_steps, refused, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps}


def build_scaler(precision: str, device: torch.device) -> LossScaler | None:
    """A loss scaler where the format needs one."""
    return LossScaler(device) if precision == "fp16" else None
