"""Reads published weights: finds the backbone in a file of any method, and renames its tensors to timm's names."""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checks import sentence

# Prefixes of a backbone's names in a file; the first that exists is the branch that the authors evaluate.
PREFIXES = (
    "teacher.module.backbone.",  # DINO, iBOT, SelfPatch, SERE, PQCL, DINOv2: a training checkpoint
    "teacher.backbone.",
    "state_dict.module.base_encoder.",  # MoCo v3
    "state_dict.base_encoder.",
    "model.encoder.",  # MoBY
    "state_dict.module.",
    "state_dict.",  # iBOT: the backbone alone
    "model.",
    "teacher.",
    "",  # DINO, DINOv2, timm, and this library's export
)
# Parts of names that identify a file's method, the most specific first.
METHODS = {
    "base_encoder.": "MoCo v3",
    "encoder_k.": "MoBY",
    "ca_head.": "SelfPatch",
    "query_block.": "PQCL",
    "sere": "SERE",
    ".ls1.gamma": "DINOv2",
    "masked_embed": "iBOT",
    "teacher.": "DINO",
}
FIRST_WEIGHTS = ("patch_embed.proj.weight", "conv1.weight")  # every backbone has one of them


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """The weights of a branch in a file."""

    layout: str  # the method of the file, and the prefix of the backbone in it
    weights: dict[str, Tensor]  # the backbone's under timm's names; SelfPatch's aggregation head's after "summary."


def read_published(path: Path) -> PublishedWeights:
    """Reads a .pth or .safetensors file. Nothing in it is executed."""
    flat = _flatten(_read(path))
    prefix = next((p for p in PREFIXES if any(f"{p}{first}" in flat for first in FIRST_WEIGHTS)), None)
    if prefix is None:
        names = " or ".join(FIRST_WEIGHTS)
        rule = f"A file of weights must hold a ViT, Swin or ResNet backbone under names that end in {names}"
        got = f"{len(flat)} tensors such as {sorted(flat)[:3]} in {path}"
        raise ValueError(sentence(rule, got, "pass the file that holds the backbone"))
    method = next((method for mark, method in METHODS.items() if any(mark in name for name in flat)), "timm")
    backbone = {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
    summary = _aggregation_head(flat, prefix.removesuffix("backbone."))
    layout = f"{method}, {prefix.rstrip('.') or 'the backbone alone'}"
    return PublishedWeights(layout, _swin_names(_fold_layer_scale(_vit_names(backbone))) | summary)


def _read(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        rule = "A file of weights must hold tensors and plain values"
        got = f"objects in {path} that only their own library can read"
        remedy = "open it where it was made and save the state dict alone"
        raise ValueError(sentence(rule, got, remedy)) from error


def _flatten(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
    return found


def _vit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames iBOT's mask token and DINOv2's blocks in chunks, blocks.<chunk>.<number>."""
    names = {name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in weights}
    return {names[name].replace("masked_embed", "mask_token"): tensor for name, tensor in weights.items()}


def _fold_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 multiplies each branch by gamma; multiplying its last layer instead gives the same function."""
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
    """The released Swin has each downsampling a stage earlier than timm, and stores tables that timm computes."""
    kept = {n: t for n, t in weights.items() if not n.endswith(("relative_position_index", "attn_mask"))}
    if not any(name.startswith("layers.0.downsample.") for name in kept):
        return kept
    return {re.sub(r"^layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) + 1}.down", n): t for n, t in kept.items()}


def _aggregation_head(flat: dict[str, Tensor], branch: str) -> dict[str, Tensor]:
    """SelfPatch's head beside the backbone, under the names of `ClassAttentionSummary`."""
    prefix = f"{branch}ca_head."
    found = {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
    return {
        f"summary.{name.replace('cls_blocks.', 'blocks.').replace('.attn.', '.')}": tensor
        for name, tensor in found.items()
    }
