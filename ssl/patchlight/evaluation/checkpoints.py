"""Opens what there is to judge: a run's folder, a teacher.safetensors, an official file, or a timm model by name."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path

import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from ..backbones.vit import ARCHITECTURES, VisionTransformer
from ..data.policy import IMAGENET_MEAN, IMAGENET_STD
from ..heads.summary import ClassAttentionSummary, ClassTokenSummary, MeanSummary
from ..records import Tokens
from .encoder import Encoder, Eyes

_FACTS = "facts.json"  # beside a teacher.safetensors of ours: the run that made it
_MARK = "patch_embed.proj.weight"  # every ViT has it, and nothing else does
_NOT_BACKBONE = ("head.", "fc.", "mask_token", "masked_embed", "query_block.", "norm2.", "fc_norm.")


def open_checkpoint(checkpoint: str, key: str = "teacher", heads: int | None = None) -> Encoder:
    """An encoder in eval mode on the CPU.

    checkpoint: a run's folder (its latest checkpoint), one step's folder, a .safetensors or .pth file, or timm's name.
    key: part of the names of the wanted backbone, where a file holds several. heads: attention heads, which no file of
    weights tells; a checkpoint of ours knows them, others are taken to have 64 channels per head.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return _open_folder(path).eval()
    if path.is_file():
        return _open_file(path, key, heads).eval()
    if path.suffix or "/" in checkpoint.removeprefix("hf-hub:") or not timm.is_model(checkpoint):
        raise FileNotFoundError(
            f"A checkpoint must be a folder, a file or the name of a timm model, got {checkpoint!r}, which is none;"
            " check the path, or list names with timm.list_models()."
        )
    return _open_timm(checkpoint).eval()


def home(checkpoint: str) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None where it belongs to none of ours."""
    here = Path(checkpoint).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "run.json").is_file()), None)


def _open_folder(path: Path) -> Encoder:
    steps = sorted(p for p in (path / "checkpoints").glob("step-*") if p.suffix != ".partial")
    step = path if (path / _FACTS).exists() else steps[-1] if steps else None
    if step is None:
        raise FileNotFoundError(
            f"A run's folder must hold a complete checkpoint, got none in {path / 'checkpoints'}; train until the first"
            " save, or pass a file."
        )
    run = json.loads((step / _FACTS).read_text())["run"]
    model = run["model"]
    stored = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    shapes = {
        name.removeprefix("teacher.backbone."): torch.empty(entry.size)
        for name, entry in stored.items()
        if name.startswith("teacher.backbone.")
    }
    backbone = _build(shapes, str(step), _heads(model, shapes), model["position_resize"])
    summary = _summary(model["summary"], backbone)
    state = {
        "teacher": {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
        | {f"summary.{n}": t for n, t in summary.state_dict().items()}
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        dcp.load(state, checkpoint_id=step, no_dist=True)  # into the tensors themselves
    return Encoder(backbone, summary, str(step), _eyes(run))


def _open_file(path: Path, key: str, heads: int | None) -> Encoder:
    weights = _backbone_weights(_flat(_read(path)), path, key)
    facts = path.with_name(_FACTS)
    run = json.loads(facts.read_text())["run"] if facts.exists() else None
    notes = []
    if run is not None:
        heads, resize = _heads(run["model"], weights), run["model"]["position_resize"]
    else:
        resize = "released"
        if heads is None:
            heads, rest = divmod(weights[_MARK].shape[0], 64)
            if rest:
                raise ValueError(
                    f"The number of attention heads cannot be told from weights, got width {weights[_MARK].shape[0]}, which"
                    f" 64 does not divide, in {path}; pass heads."
                )
    backbone = _build(weights, str(path), heads, resize)
    norm = {name.removeprefix("norm."): t for name, t in weights.items() if name.startswith("norm.")}
    summary: nn.Module = ClassTokenSummary()
    if not backbone.has_class_token:
        summary = MeanSummary(backbone.width if norm else None)
        if norm:
            summary.norm.load_state_dict(norm)
            norm_names = {f"norm.{name}" for name in norm}
            weights = {name: t for name, t in weights.items() if name not in norm_names}
        else:
            notes.append("no final norm in the file: patches are the raw residual stream")
        notes.append("no class token in the file: an image is summed up by the mean of its patches")
    left = _load(backbone, weights, path)
    if left:
        notes.append(f"{len(left)} tensors are no part of the backbone and were left out, such as {left[0]}")
    return Encoder(backbone, summary, str(path), _eyes(run), tuple(notes))


def _read(path: Path) -> dict:
    """The tree of tensors in a file; nothing in it is executed."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _flat(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
    return found


def _backbone_weights(flat: dict[str, Tensor], path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of the one backbone that is meant, under timm's names."""
    prefixes = sorted(name.removesuffix(_MARK) for name in flat if name.endswith(_MARK) and flat[name].ndim == 4)
    if not prefixes:
        some = ", ".join(list(flat)[:3]) or "nothing"
        raise ValueError(
            f"A checkpoint must hold a ViT backbone ({_MARK}), got {len(flat)} tensors without one ({some}) in {path};"
            " pass the file that holds the backbone, not a head or an optimizer."
        )
    meant = prefixes if len(prefixes) == 1 else [p for p in prefixes if key in p.split(".")]
    if len(meant) != 1:
        raise ValueError(
            f"Of several backbones in a file one must be meant, got key={key!r} for {', '.join(prefixes)} in {path};"
            " pass as key a part of the wanted name."
        )
    return {name.removeprefix(meant[0]): tensor for name, tensor in flat.items() if name.startswith(meant[0])}


def _build(weights: dict[str, Tensor], path: str, heads: int, resize: str) -> VisionTransformer:
    """A ViT of the shapes in `weights`, which hold values or only shapes."""
    width, _, patch, _ = weights[_MARK].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    class_token = "cls_token" in weights
    side = math.isqrt(weights["pos_embed"].shape[1] - class_token) if "pos_embed" in weights else 0
    if not depth or not side or side**2 != weights["pos_embed"].shape[1] - class_token:
        raise ValueError(
            "A ViT needs blocks and a square position table under timm's names, got"
            f" {depth} blocks and {'no table' if 'pos_embed' not in weights else tuple(weights['pos_embed'].shape)}"
            f" in {path}; convert the file to timm's names first."
        )
    ratio = weights["blocks.0.mlp.fc1.weight"].shape[0] / width if "blocks.0.mlp.fc1.weight" in weights else 4.0
    return VisionTransformer(width, depth, heads, patch, side * patch, ratio, class_token, position_resize=resize)


def _load(backbone: nn.Module, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Copies the weights; every parameter must be there. Returns the names that are no part of a backbone."""
    wanted = backbone.state_dict()
    optional = {"mask_token"}
    missing = [name for name in wanted if name not in weights and name not in optional]
    extra = [name for name in weights if name not in wanted]
    inside = [name for name in extra if not name.startswith(_NOT_BACKBONE)]
    wrong = [name for name in wanted if name in weights and weights[name].numel() != wanted[name].numel()]
    if missing or inside or wrong:
        raise ValueError(
            f"A checkpoint must fit the plain ViT of its shapes, got {len(missing)} tensors missing, {len(inside)} unknown"
            f" and {len(wrong)} of another size in {path}, such as {(missing + inside + wrong)[0]}; use timm's name if"
            " timm knows the model."
        )
    fitting = {name: weights[name].reshape(wanted[name].shape).float() for name in wanted if name in weights}
    backbone.load_state_dict(wanted | fitting)
    return [name for name in extra if not name.startswith(("mask_token", "masked_embed"))]


def _heads(model: dict, weights: dict[str, Tensor]) -> int:
    """Of a checkpoint of ours: as its run says, else as its architecture has."""
    return {**ARCHITECTURES.get(model["arch"], {"heads": weights[_MARK].shape[0] // 64}), **model["sizes"]}["heads"]


def _summary(kind: str, backbone: VisionTransformer) -> nn.Module:
    if kind == "class_attention":
        return ClassAttentionSummary(backbone.width, backbone.heads)
    return MeanSummary(backbone.width) if kind == "mean" else ClassTokenSummary()


def _eyes(run: dict | None) -> Eyes:
    if run is None:
        return Eyes()
    crops = run["data"]["crops"]
    mean, std = crops.get("mean", IMAGENET_MEAN), crops.get("std", IMAGENET_STD)
    return Eyes(run["model"]["image_size"], tuple(mean), tuple(std))


class TimmBackbone(nn.Module):
    """A timm model behind our interface: a ViT with its tokens, anything else with the cells of its last map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.width = model.num_features
        self.prefix = getattr(model, "num_prefix_tokens", 0)
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.is_vit = hasattr(model, "blocks") and hasattr(model, "patch_embed")
        self.patch_size = model.patch_embed.patch_size[0] if self.is_vit else model.feature_info[-1]["reduction"]
        self.heads = model.blocks[0].attn.num_heads if self.is_vit else 1

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        return self.model.blocks if self.is_vit else nn.Sequential(self.model)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size

    def forward(self, pixels: Tensor, mask: None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens through the final norm; layers counts blocks of a ViT, -1 elsewhere."""
        depth = len(self.blocks)
        numbers = sorted({layer % depth for layer in (*layers, -1)})
        if not self.is_vit:
            (map_,) = self.model.forward_intermediates(pixels, indices=1, intermediates_only=True, output_fmt="NCHW")
            patches = map_.flatten(2).transpose(1, 2)
            return Tokens(None, patches, tuple(map_.shape[-2:]), (patches,) * len(layers))
        kept = self.model.forward_intermediates(
            pixels, indices=numbers, norm=True, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        tokens = {
            number: torch.cat([prefix[:, :1], patches], 1) if self.has_class_token else patches
            for number, (patches, prefix) in zip(numbers, kept, strict=True)
        }
        last = tokens[depth - 1]
        cls, patches = (last[:, 0], last[:, 1:]) if self.has_class_token else (None, last)
        return Tokens(cls, patches, self.grid(*pixels.shape[-2:]), tuple(tokens[layer % depth] for layer in layers))


def _open_timm(name: str, pretrained: bool = True) -> Encoder:
    dynamic = (
        {"dynamic_img_size": True} if timm.model_entrypoint(name).__module__.endswith("vision_transformer") else {}
    )
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, **dynamic)
    backbone, config = TimmBackbone(model), model.pretrained_cfg
    summary = ClassTokenSummary() if backbone.has_class_token else MeanSummary()
    notes = () if backbone.has_class_token else ("no class token: an image is summed up by the mean of its patches",)
    eyes = Eyes(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))
    return Encoder(backbone, summary, f"timm {name}", eyes, notes)
