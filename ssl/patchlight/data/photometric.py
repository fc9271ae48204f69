"""The photometric step of every loader: uint8 crops and the numbers drawn for them to normalized crops, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from patchlight_kernels import PHOTOMETRIC_COLUMNS, photometric

from .policy import CropPolicy, CropTable

SOLARIZED_FROM = 127.5  # what would round to 128 or more, and the point where inverting is no jump


def look_table(table: CropTable) -> Tensor:
    """The numbers that change colors and sharpness, as the op reads them: [V, B, columns] fp32."""
    solarize = np.where(table.solarize, SOLARIZED_FROM, PHOTOMETRIC_COLUMNS["solarize"])
    columns = [solarize if name == "solarize" else getattr(table, name) for name in PHOTOMETRIC_COLUMNS]
    return torch.from_numpy(np.stack(columns, axis=-1).astype(np.float32))


def change(pixels: Tensor, looks: Tensor, policy: CropPolicy) -> Tensor:
    """Crops [V, B, S, S, 3] uint8 and their look_table, both on one device, to [V, B, 3, S, S] fp32, normalized."""
    changed = photometric(pixels.flatten(0, 1), looks.flatten(0, 1), policy.mean, policy.std)
    return changed.unflatten(0, pixels.shape[:2])
