"""A trained encoder as a folder that `open_checkpoint` opens: the form of an exported one, with a description of its network.

The weights have timm's names, class attention has a file of its own, and facts.json says under "encoder" how the network is
built. So an encoder of any origin can be saved, also one that no run of this library has made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ..backbones.interface import Backbone
from ..backbones.positions import EMBEDDINGS
from ..backbones.resnet import ResNet
from ..backbones.swin import SwinTransformer
from ..backbones.timm_backbone import TimmBackbone
from ..backbones.vit import VisionTransformer
from ..backbones.weight_file import check_weights, read_tensors
from ..checkpoint.folder import FACTS
from ..checks import check, check_new_folder, sentence
from ..durable import make_folder, move, write_whole
from ..heads.summary import MeanSummary, build_summary
from .encoder import Encoder, InputFormat

# The backbone under timm's names; the class attention, which timm does not have, if that is the summary.
EXPORTED, EXPORTED_SUMMARY = "model.safetensors", "summary.safetensors"
ENCODER, FINETUNED = "encoder", "finetuned"  # among the facts: how it is built; what it was trained on, and how
_CLASSES: dict[str, type[Backbone]] = {kind.__name__: kind for kind in (VisionTransformer, SwinTransformer, ResNet)}


def check_new(folder: Path) -> None:
    """Makes the folder; an error if it holds anything."""
    check_new_folder("The folder of --save", folder)
    make_folder(folder)


def write_encoder(folder: Path, encoder: Encoder, facts: Mapping[str, Any], others: Mapping[str, bytes]) -> None:
    """Writes the folder, which appears whole or not at all. others: the contents of further files."""
    weights, summary = file_tensors(encoder)
    described = dict(facts) | {ENCODER: describe_encoder(encoder)}
    files = {EXPORTED: as_file(weights), FACTS: json.dumps(described, indent=1).encode()} | dict(others)
    if summary:
        files[EXPORTED_SUMMARY] = as_file(summary)
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}")
    try:
        for name, content in files.items():
            write_whole(partial / name, content)
        again = file_tensors(read_encoder(partial))
        same = all(map(_same, again, (weights, summary)))
        rule = f"A saved {type(encoder.backbone).__name__} must be what was trained"
        check(same, rule, "other weights when it was read again", "report this")
        check_new(folder)
        move(partial, folder.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(tensor.equal(wanted[name].cpu()) for name, tensor in found.items())


def as_file(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file of safetensors."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(plain, {"format": "pt"})  # what its readers expect


def file_tensors(encoder: Encoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An encoder's tensors by their names in both files; the final norm has a place in the first, wherever it is."""
    backbone, summary = encoder.backbone, encoder.summary
    module = backbone.model if isinstance(backbone, TimmBackbone) else backbone
    assert isinstance(module, nn.Module)
    weights = {name: tensor for name, tensor in module.state_dict().items() if name != "mask_token"}
    own = summary.state_dict()
    norm = {name: tensor for name, tensor in own.items() if name.startswith("norm.")}
    return weights | ({} if norm.keys() & weights.keys() else norm), {} if own.keys() == norm.keys() else own


def is_described(folder: Path) -> bool:
    """Whether a folder is of `write_encoder`."""
    path = folder / FACTS
    return (folder / EXPORTED).is_file() and path.is_file() and ENCODER in _facts(path)


def read_encoder(folder: Path) -> Encoder:
    """The encoder that `write_encoder` wrote there."""
    facts = _facts(folder / FACTS)
    try:
        described = facts[ENCODER]
        backbone = _build_backbone(described["backbone"])
        summary = _build_summary(described["summary"], backbone)
        shape = InputFormat(described["image_size"], tuple(described["mean"]), tuple(described["std"]))
        notes = [str(note) for note in described["notes"]]
        if made := facts.get(FINETUNED):
            notes.append(f"fine-tuned on {made['data']}, {100 * made['top1']:.2f} % top1")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        rule, got = f"{FACTS} must describe the network beside it", f"{type(error).__name__}: {error} in {folder}"
        raise ValueError(sentence(rule, got, "copy all files of the folder again")) from error
    encoder = Encoder(backbone, summary, str(folder), shape, tuple(notes))
    for name, tensors in zip((EXPORTED, EXPORTED_SUMMARY), file_tensors(encoder), strict=True):
        if tensors:
            _read_into(folder / name, tensors)
    return encoder


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Copies the tensors of a file, which must be exactly these."""
    found = read_tensors(path)
    check_weights({name: tensor for name, tensor in found.items() if tensor.is_floating_point()}, path)
    wrong = sorted(found.keys() ^ tensors.keys())
    wrong += [name for name, tensor in tensors.items() if name in found and found[name].shape != tensor.shape]
    rule, got = f"{path.name} must have the tensors of the network in {FACTS}", f"{len(wrong)} others in {path}"
    check(not wrong, rule, f"{got}, such as {wrong[:1]}", "copy all files of the folder again")
    for name, tensor in tensors.items():
        tensor.copy_(found[name])


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """How an encoder is built, without its weights."""
    summary, shape = encoder.summary, encoder.input_format
    return {
        "backbone": _describe_backbone(encoder.backbone, shape.image_size),
        "summary": {
            "kind": getattr(summary, "kind", ""),
            "norm": isinstance(getattr(summary, "norm", 0), nn.LayerNorm),
        },
        "image_size": shape.image_size,
        "mean": list(shape.mean),
        "std": list(shape.std),
        "notes": list(encoder.notes),
    }


def _describe_backbone(backbone: Any, image_size: int) -> dict[str, Any]:
    """The class and its arguments, or timm's name and options."""
    if isinstance(backbone, TimmBackbone):
        name = (getattr(backbone.model, "pretrained_cfg", None) or {}).get("architecture")
        rule = "A timm model that is saved must have been created by its name"
        check(name is not None, rule, type(backbone.model).__name__, "create it with timm.create_model")
        return {"timm": name, "options": _any_size(backbone.model)}
    described = next((make for kind, make in _DESCRIBED.items() if isinstance(backbone, kind)), None)
    rule, got = "A network that is saved must be a ViT, Swin, ResNet or timm model", type(backbone).__name__
    check(described is not None, rule, got, "save its state dict yourself")
    assert described is not None
    return {"class": type(backbone).__name__, "patch_size": backbone.patch_size, **described(backbone, image_size)}


def _any_size(model: Any) -> dict[str, bool]:
    """timm's option with which a model was created that takes images of any size."""
    if getattr(model, "dynamic_img_size", False):
        return {"dynamic_img_size": True}
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    return {} if strict else {"strict_img_size": False}


def _vit(vit: Any, image_size: int) -> dict[str, Any]:
    block = vit.blocks[0]
    return {
        "width": vit.width,
        "depth": len(vit.blocks),
        "heads": vit.heads,
        "image_size": vit.table_grid[0] * vit.patch_size,
        "mlp_ratio": block.mlp.fc1.out_features / vit.width,
        "class_token": vit.has_class_token,
        "position_resize": vit.position_resize,
        "positions": next((n for n, kind in EMBEDDINGS.items() if kind is vit.embed_positions), "learned"),
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _swin(swin: Any, image_size: int) -> dict[str, Any]:
    return {
        "stem_width": swin.stem_width,
        "depth": len(swin.layers[2].blocks),
        "head_width": swin.width // swin.heads,
        "window": swin.layers[0].blocks[0].window_size[0],
        "image_size": swin.patch_embed.img_size[0],
    }


def _resnet(resnet: Any, image_size: int) -> dict[str, Any]:
    block = type(resnet.blocks[0])
    return {
        "bottleneck": block is Bottleneck,
        "depths": [len(stage) for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)],
        "stem_width": resnet.width // (8 * block.expansion),
        "image_size": image_size,
    }


_DESCRIBED = {VisionTransformer: _vit, SwinTransformer: _swin, ResNet: _resnet}


def _build_backbone(described: Mapping[str, Any]) -> Backbone:
    if "timm" in described:
        options: dict[str, Any] = dict(described["options"])
        return TimmBackbone(timm.create_model(described["timm"], pretrained=False, num_classes=0, **options))
    return _CLASSES[described["class"]](**{name: value for name, value in described.items() if name != "class"})


def _build_summary(described: Mapping[str, Any], backbone: Backbone) -> nn.Module:
    if described["kind"] == "mean" and not described["norm"]:
        return MeanSummary()
    return build_summary(described["kind"], backbone)
