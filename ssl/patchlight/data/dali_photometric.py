"""The photometric step in DALI's own operators. Not the same augmentation: docs/data.md lists the differences."""

from __future__ import annotations

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIImageType

from patchlight_kernels import PHOTOMETRIC_COLUMNS

from .policy import CropPolicy


def apply_photometric_in_dali(crop: DataNode, table: DataNode, policy: CropPolicy) -> DataNode:
    """Crops [S, S, 3] uint8, each with a row of PHOTOMETRIC_COLUMNS, to [3, S, S] fp32, normalized.

    Always brightness, contrast, saturation, hue, in this order; values are rounded to uint8 in between. Part of a graph
    with conditionals: the batch is split by each `if`.
    """
    column = {name: table[number] for number, name in enumerate(PHOTOMETRIC_COLUMNS)}
    mean_gray = fn.reductions.mean(
        fn.color_space_conversion(crop, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY)
    )
    crop = fn.brightness_contrast(
        crop,
        brightness=column["brightness"],
        contrast=column["contrast"],
        contrast_center=mean_gray.cpu(),  # DALI takes arguments from the CPU only, on a GPU too
    )
    saturation = column["saturation"] * (column["gray"] == 0)  # saturation 0 is gray
    crop = fn.color_twist(crop, saturation=saturation, hue=360 * column["hue"])
    if column["sigma"] > 0:
        crop = fn.gaussian_blur(crop, sigma=column["sigma"])
    else:
        crop = crop
    if column["solarize"] < 256:
        crop = fn.lookup_table(crop, keys=list(range(256)), values=_SOLARIZED, dtype=DALIDataType.UINT8)
    else:
        crop = crop
    return fn.crop_mirror_normalize(
        crop,
        dtype=DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in policy.mean],
        std=[255 * value for value in policy.std],
    )


_SOLARIZED = np.minimum(np.arange(256), 255 - np.arange(256)).tolist()
