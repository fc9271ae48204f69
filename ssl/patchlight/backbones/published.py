"""Weights that others have published, under timm's names: whose layout a file has, and what is called how there."""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# Where a backbone lies in a file, the wanted one first: the branch that the authors themselves evaluate.
PLACES = (
    "teacher.module.backbone.",  # DINO, iBOT, SelfPatch, SERE, PQCL, DINOv2: a training checkpoint
    "teacher.backbone.",
    "state_dict.module.base_encoder.",  # MoCo v3
    "state_dict.base_encoder.",
    "model.encoder.",  # MoBY
    "state_dict.module.",
    "state_dict.",  # iBOT: the backbone alone
    "model.",
    "teacher.",
    "",  # DINO, DINOv2, timm, and our own export
)
# A name in a file that gives its method away, most telling first.
MARKS = {
    "base_encoder.": "MoCo v3",
    "encoder_k.": "MoBY",
    "ca_head.": "SelfPatch",
    "query_block.": "PQCL",
    "sere": "SERE",
    ".ls1.gamma": "DINOv2",
    "masked_embed": "iBOT",
    "teacher.": "DINO",
}
FIRST = ("patch_embed.proj.weight", "conv1.weight")  # where every backbone begins


@dataclass(frozen=True, slots=True)
class Published:
    """What a file holds of a branch."""

    layout: str  # the method whose layout it is, and where in the file the backbone lies
    weights: dict[
        str, Tensor
    ]  # the backbone's under timm's names; "summary." in front of SelfPatch's aggregation head's


def read_published(path: Path) -> Published:
    """Reads a .pth or .safetensors file. Nothing in it is executed."""
    flat = _flat(_read(path))
    place = next((p for p in PLACES if any(f"{p}{first}" in flat for first in FIRST)), None)
    if place is None:
        raise ValueError(
            f"A file of weights must hold a ViT, Swin or ResNet backbone under names that end in {' or '.join(FIRST)}, "
            f"got {len(flat)} tensors such as {sorted(flat)[:3]} in {path}; pass the file that holds the backbone."
        )
    method = next((method for mark, method in MARKS.items() if any(mark in name for name in flat)), "timm")
    backbone = {name.removeprefix(place): tensor for name, tensor in flat.items() if name.startswith(place)}
    summary = _aggregation_head(flat, place.removesuffix("backbone."))
    layout = f"{method}, {place.rstrip('.') or 'the backbone alone'}"
    return Published(layout, _swin_names(_fold_layer_scale(_vit_names(backbone))) | summary)


def _read(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"A file of weights must hold tensors and plain values, got objects in {path} that only their own library can "
            "read; open it where it was made and save the state dict alone."
        ) from error


def _flat(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
    return found


def _vit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """iBOT's mask token; DINOv2's blocks in chunks, blocks.<chunk>.<number>."""
    names = {name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in weights}
    return {names[name].replace("masked_embed", "mask_token"): tensor for name, tensor in weights.items()}


def _fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 scales each branch by gamma; scaling its last layer instead is the same function."""
    folded = dict(weights)
    for name, gamma in weights.items():
        match = re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", name)
        if match:
            last = match[1] + {"1": "attn.proj.", "2": "mlp.fc2."}[match[2]]
            folded[f"{last}weight"] = weights[f"{last}weight"] * gamma[:, None]
            folded[f"{last}bias"] = weights[f"{last}bias"] * gamma
            del folded[name]
    return folded


def _swin_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released Swin ends a stage with what timm begins the next one with, and stores tables that timm computes."""
    kept = {n: t for n, t in weights.items() if not n.endswith(("relative_position_index", "attn_mask"))}
    if not any(name.startswith("layers.0.downsample.") for name in kept):
        return kept
    return {re.sub(r"^layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) + 1}.down", n): t for n, t in kept.items()}


def _aggregation_head(flat: dict[str, Tensor], branch: str) -> dict[str, Tensor]:
    """SelfPatch's head beside the backbone, under the names of `ClassAttentionSummary`."""
    mark = f"{branch}ca_head."
    found = {name.removeprefix(mark): tensor for name, tensor in flat.items() if name.startswith(mark)}
    return {
        f"summary.{name.replace('cls_blocks.', 'blocks.').replace('.attn.', '.')}": tensor
        for name, tensor in found.items()
    }
