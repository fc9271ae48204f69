"""COCO's masks: polygons, lists of runs and compressed runs, all as compressed runs; and masks of predictions."""

from __future__ import annotations

import math
from typing import Any

import faster_coco_eval.core.mask as coco_mask
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def check_mask(stored: Any, height: int, width: int) -> str:
    """What is wrong with masks like this one, as a file has it; empty: nothing."""
    if isinstance(stored, list):
        whole = stored and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in stored)
        numbers = whole and all(isinstance(n, int | float) and abs(n) < 1e5 for p in stored for n in p)  # NaN is not
        return "" if numbers else "their masks are no polygons with three corners or more"
    if not isinstance(stored, dict) or not {"size", "counts"} <= stored.keys():
        return "they have no mask"
    if stored["size"] != [height, width]:
        return "their masks have another size than the image"
    counts = stored["counts"]
    if isinstance(counts, list):
        runs = all(isinstance(n, int) and n >= 0 for n in counts) and sum(counts) == height * width
        return "" if runs else "the runs of their masks do not fill the image"
    try:
        coco_mask.decode(_compressed(str(counts), height, width))
    except (ValueError, RuntimeError):
        return "their compressed masks cannot be read"
    return ""


def encoded_mask(stored: Any, height: int, width: int) -> dict:
    """A stored mask that was checked, as compressed runs."""
    if isinstance(stored, list):
        return coco_mask.merge(coco_mask.frPyObjects(stored, height, width))
    if isinstance(stored["counts"], list):
        return coco_mask.frPyObjects(stored, height, width)
    return _compressed(stored["counts"], height, width)


def decoded_masks(encoded: list[dict], height: int, width: int) -> np.ndarray:
    """Masks [n, height, width] uint8 of compressed runs."""
    if not encoded:
        return np.zeros((0, height, width), np.uint8)
    return coco_mask.decode(encoded).transpose(2, 0, 1)


def pasted_masks(shares: Tensor, boxes: Tensor, height: int, width: int) -> list[dict]:
    """Predicted masks [n, 1, h, w], each inside its box [n, 4], as compressed runs at image size, one after the other."""
    return [
        compressed(_pasted(share, box, height, width))
        for share, box in zip(shares.float().cpu(), boxes.double().cpu().tolist(), strict=True)
    ]


def _pasted(share: Tensor, box: list[float], height: int, width: int) -> np.ndarray:
    """A mask [height, width] uint8: 1 where the centers of pixels have half of a share [1, h, w] or more."""
    whole = np.zeros((height, width), np.uint8)
    places, parts = [], []
    for low, high, side in ((box[1], box[3], height), (box[0], box[2], width)):
        first = max(0, math.floor(low))
        part = slice(first, max(first, min(side, math.ceil(high))))
        centers = torch.arange(part.start, part.stop) + 0.5
        places.append(2 * (centers - low) / max(high - low, 1e-6) - 1)
        parts.append(part)
    if all(map(len, places)):
        grid = torch.stack(torch.meshgrid(places[1], places[0], indexing="xy"), -1)
        whole[tuple(parts)] = F.grid_sample(share[None], grid[None], align_corners=False)[0, 0] >= 0.5
    return whole


def compressed(mask: np.ndarray) -> dict:
    """A mask [height, width] as compressed runs that JSON can hold."""
    return {"size": list(mask.shape), "counts": coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()}


def _compressed(counts: str, height: int, width: int) -> dict:
    return {"size": [height, width], "counts": counts.encode()}
