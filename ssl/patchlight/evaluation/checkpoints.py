"""Opens what there is to judge: a run's folder, a teacher.safetensors, an official file, or a timm model by name."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import timm
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ..backbones.architectures import build_backbone, capabilities_of
from ..backbones.interface import Backbone
from ..backbones.published import read_published
from ..backbones.vit import VisionTransformer
from ..heads.summary import ClassTokenSummary, MeanSummary, build_summary
from ..records import Tokens
from .encoder import Encoder, Eyes

_FACTS = "facts.json"  # beside a teacher.safetensors of ours: the run that made it
_NOT_BACKBONE = ("head.", "fc.", "mask_token", "query_block.", "norm2.", "fc_norm.")  # of a ViT's file


def open_checkpoint(checkpoint: str, heads: int | None = None) -> Encoder:
    """An encoder in eval mode on the CPU.

    checkpoint: a run's folder (its latest checkpoint), one step's folder, a .safetensors or .pth file, or timm's name. Of
    files with several networks the one that their authors evaluate is taken. heads: attention heads, which no file of
    weights tells; a checkpoint of ours knows them, others are taken to have 64 channels per head (MoCo v3's ViT-S has 12).
    """
    path = Path(checkpoint)
    if path.is_dir():
        return _open_folder(path).eval()
    if path.is_file():
        return _open_file(path, heads).eval()
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
    backbone = _build_as(run["model"])
    summary = build_summary(run["model"]["summary"], backbone)
    state = {
        "teacher": {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
        | {f"summary.{n}": t for n, t in summary.state_dict().items()}
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        dcp.load(state, checkpoint_id=step, no_dist=True)  # into the tensors themselves
    return Encoder(backbone, summary, str(step), _eyes(run))


def _open_file(path: Path, heads: int | None) -> Encoder:
    published, facts = read_published(path), path.with_name(_FACTS)
    weights = published.weights
    run = json.loads(facts.read_text())["run"] if facts.exists() else None
    backbone = _build_as(run["model"]) if run else _build_by_shapes(weights, path, heads)
    summary_weights = {name.removeprefix("summary."): t for name, t in weights.items() if name.startswith("summary.")}
    weights = {name: t for name, t in weights.items() if not name.startswith("summary.")}
    norm = {name.removeprefix("norm."): t for name, t in weights.items() if name.startswith("norm.")}
    notes = [] if run else [f"layout of {published.layout}"]
    if summary_weights:
        summary = build_summary("class_attention", backbone)
        summary.load_state_dict(summary_weights)
    elif backbone.has_class_token:
        summary = ClassTokenSummary()
    else:
        notes.append("no summary head in the file: an image is summed up by the mean of its patches")
        summary = build_summary("mean", backbone) if norm or backbone.norm_eps is None else MeanSummary()
        if norm and not any(name.startswith("norm.") for name in backbone.state_dict()):
            summary.norm.load_state_dict(norm)
            weights = {name: t for name, t in weights.items() if not name.startswith("norm.")}
        elif not norm and backbone.norm_eps is not None:
            notes.append("no final norm in the file: patches are the raw residual stream")
    left = _load(backbone, weights, path)
    if left:
        notes.append(f"{len(left)} tensors are no part of the backbone and were left out, such as {left[0]}")
    return Encoder(backbone, summary, str(path), _eyes(run), tuple(notes))


def _build_as(model: dict) -> Backbone:
    """The backbone of a run of ours, from the model in its facts."""
    options = {"patch_size": model["patch_size"], "image_size": model["image_size"], **model["sizes"]}
    if "class_token" in capabilities_of(model["arch"]):
        options |= {"class_token": model["summary"] == "cls"}
        options |= {name: model[name] for name in ("position_resize", "positions") if name in model}
    return build_backbone(model["arch"], **options)


def _build_by_shapes(weights: dict[str, Tensor], path: Path, heads: int | None) -> VisionTransformer:
    """A plain ViT of the weights' shapes."""
    table = weights.get("pos_embed")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    class_token = "cls_token" in weights
    side = 0 if table is None else math.isqrt(table.shape[1] - class_token)
    if not depth or not side or side**2 != table.shape[1] - class_token:
        raise ValueError(
            "Weights of others can be judged if they are a plain ViT's with a square position table, got"
            f" {depth} blocks and {'no table' if table is None else tuple(table.shape)} in {path}; pass timm's name of the"
            " model, or a run of ours that began with them (Model.init_from)."
        )
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    if heads is None:
        heads, rest = divmod(width, 64)
        if rest:
            raise ValueError(
                f"The number of attention heads cannot be told from weights, got width {width}, which 64 does not divide,"
                f" in {path}; pass heads."
            )
    first = weights.get("blocks.0.mlp.fc1.weight")
    ratio = 4.0 if first is None else first.shape[0] / width
    return VisionTransformer(width, depth, heads, patch, side * patch, ratio, class_token)


def _load(backbone: nn.Module, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Copies the weights; every parameter must be there. Returns the names that are no part of a backbone."""
    wanted = backbone.state_dict()
    missing = [name for name in wanted if name not in weights and name != "mask_token"]
    extra = [name for name in weights if name not in wanted]
    inside = [name for name in extra if not name.startswith(_NOT_BACKBONE)]
    wrong = [name for name in wanted if name in weights and weights[name].numel() != wanted[name].numel()]
    if missing or inside or wrong:
        raise ValueError(
            f"A checkpoint must fit the plain ViT of its shapes, got {len(missing)} tensors missing, {len(inside)} unknown"
            f" and {len(wrong)} of another size in {path}, such as {(missing + inside + wrong)[0]}; use timm's name if"
            " timm knows the model."
        )
    fitting = {name: weights[name].reshape(wanted[name].shape) for name in wanted if name in weights}
    backbone.load_state_dict(wanted | fitting)
    return extra


def _eyes(run: dict | None) -> Eyes:
    if run is None:
        return Eyes()
    crops = run["data"]["crops"]
    return Eyes(run["model"]["image_size"], tuple(crops["mean"]), tuple(crops["std"]))


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
