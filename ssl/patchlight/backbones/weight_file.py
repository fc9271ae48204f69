"""Reads the tensors of a .pth or .safetensors file, and checks them. Nothing in a file is executed."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checks import check, sentence

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_ENTRIES, DEEPEST = 1_000_000, 32  # of dictionaries in a file; a file that names itself in itself has no end


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by dotted names, such as "teacher.backbone.cls_token"."""
    _check_file(path)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except Exception as error:  # the readers raise errors of a dozen kinds for damaged files
        raise ValueError(_complaint(path, error)) from error
    rule, remedy = "A file of weights must hold tensors by name", "save the state dict of the model"
    check(isinstance(content, dict), rule, f"a {type(content).__name__} in {path}", remedy)
    found: dict[str, Tensor] = {}
    _flatten(content, path, found, [0])
    return found


def check_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """A ValueError unless all are plain tensors of finite floating-point numbers."""
    for name, tensor in weights.items():
        plain = (
            type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        )
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            rule, got = (
                "Weights must be plain tensors with a value for each place",
                f"another kind for {name} in {path}",
            )
            raise ValueError(sentence(rule, got, "save the state dict of the whole model on a CPU"))
        if name.endswith("num_batches_tracked"):  # BatchNorm's own count, which nothing here reads
            continue
        rule, got = "Weights must be fp16, bf16, fp32 or fp64", f"{tensor.dtype} for {name} in {path}"
        check(tensor.dtype in DTYPES, rule, got, "save the weights before they are quantized")
        bad = int((~tensor.float().isfinite()).sum())
        got = f"{bad} of {tensor.numel()} values of {name} that are not, in {path}"
        check(not bad, "Weights must be finite numbers in fp32", got, "take an earlier checkpoint of that training")


def _check_file(path: Path) -> None:
    """A sentence for what cannot be opened."""
    rule, remedy = "A file of weights must be a file with content that can be read", "check the path"
    if not os.path.isfile(path):  # Path.is_file raises for some paths
        if os.path.isdir(path):
            raise ValueError(sentence(rule, f"{path}, which is a folder", "pass a file in it"))
        raise FileNotFoundError(sentence(rule, f"{path}, which is no file", remedy))
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise ValueError(sentence(rule, f"{path}: {error.strerror}", "make it readable")) from error
    check(not empty, rule, f"{path}, which is empty", "copy or download it again")


def _load_pickle(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _complaint(path: Path, error: Exception) -> str:
    """What is wrong with a file, from the error of its reader: objects in it, or damage."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+) (?:was not|whose)|[Uu]nsupported class (\S+)", text)
    if named:
        rule, name = "A file of weights must hold tensors and plain values", (named[1] or named[2]).rstrip(".,")
        got = f"objects in {path} that only their own library can read, such as {name}"
        return sentence(rule, got, "open it where it was made and save the state dict alone")
    lines = [
        line.strip() for line in text.rpartition("WeightsUnpickler error:")[2].splitlines()
    ]  # torch adds advice before it
    reason = next((line for line in lines if line), "no reason")[:200].rstrip(".")
    got = f"{path}, which is damaged or of another kind ({type(error).__name__}: {reason})"
    return sentence("A file of weights must be a whole .pth or .safetensors file", got, "copy or download it again")


def _flatten(
    tree: dict, path: Path, found: dict[str, Tensor], entries: list[int], prefix: str = "", depth: int = 1
) -> None:
    """Adds the tensors below `prefix`; counts all entries."""
    for name, value in tree.items():
        entries[0] += 1
        if entries[0] > MOST_ENTRIES or depth > DEEPEST:
            rule = f"A file of weights must have at most {MOST_ENTRIES} entries in {DEEPEST} levels"
            raise ValueError(sentence(rule, f"more in {path}", "save the state dict of the model"))
        if isinstance(value, dict):
            _flatten(value, path, found, entries, f"{prefix}{name}.", depth + 1)
        elif isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
