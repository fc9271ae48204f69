"""The photometric step of every loader: uint8 crops and the numbers drawn for them to normalized crops, on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from patchlight_kernels import PHOTOMETRIC_COLUMNS, photometric

from .policy import CropPolicy, CropTable

SOLARIZED_FROM = 127.5  # values that would round to 128 or more; there inverting is no jump


def photometric_table(table: CropTable) -> Tensor:
    """The numbers that change colors and sharpness, in the op's columns: [V, B, columns] fp32."""
    solarize = np.where(table.solarize, SOLARIZED_FROM, PHOTOMETRIC_COLUMNS["solarize"])
    columns = [solarize if name == "solarize" else getattr(table, name) for name in PHOTOMETRIC_COLUMNS]
    return torch.from_numpy(np.stack(columns, axis=-1).astype(np.float32))


def apply_photometric(pixels: Tensor, table: Tensor, policy: CropPolicy) -> Tensor:
    """Crops [V, B, S, S, 3] uint8 and their photometric_table, on the same device, to [V, B, 3, S, S] fp32, normalized."""
    changed = photometric(pixels.flatten(0, 1), table.flatten(0, 1), policy.mean, policy.std)
    return changed.unflatten(0, pixels.shape[:2])
