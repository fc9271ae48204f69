"""Floating point operations per image, and the peak of a device: MFU (model FLOPs utilization) is their ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from .backbones.architectures import build_backbone
from .run import Model, Run

# Dense bf16 or fp16 operations per second, as the makers state them, by what a device's name contains; first match.
PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What MFU is computed from; there is none where a number is unknown (None)."""

    flops_per_image: float | None = None
    peak_flops: float | None = None


def cost_of(run: Run, device: torch.device) -> Cost:
    """The cost of a run on a device. Where the device's peak is unknown, nothing is counted."""
    peak = peak_flops(device, run.parallel.precision)
    return Cost() if peak is None else Cost(flops_per_image(run), peak)


def flops_per_image(run: Run) -> float:
    """Useful operations of one training step per image: the student forward and backward, the teacher forward on global
    crops. Backbones only, so MFU is a lower bound."""
    forward = {
        kind: sum(spec.count for spec in specs) * backbone_flops(run.model, specs[0].size)
        for kind, specs in run.data.crops.kinds()
    }
    return 3 * sum(forward.values()) + forward["global_crops"]


def backbone_flops(model: Model, image_size: int) -> float:
    """Operations (2 per multiply-add) of a backbone's forward pass on one image, counted without computing it."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone = build_backbone(
            model.arch, patch_size=model.patch_size, image_size=model.image_size, **model.sizes
        ).eval()
        backbone(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that the device's maker states for a number format; None where unknown."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)
