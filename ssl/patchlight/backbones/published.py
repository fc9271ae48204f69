"""Reads published weights: finds the backbone in a file of any method, and renames its tensors to timm's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checks import check, sentence
from .weight_file import check_weights, read_tensors

# Prefixes of a backbone's names in a file; the first that exists is the branch that the authors evaluate.
PREFIXES = (
    "state_dict.module.encoder_q.0.",  # DenseCL and others of OpenSelfSup: a training checkpoint
    "state_dict.encoder_q.0.",
    "state_dict.module.encoder_q.",  # MoCo v2, ReSim, DetCo
    "state_dict.encoder_q.",
    "teacher.module.backbone.",  # DINO, iBOT, SelfPatch, SERE, PQCL, DINOv2: a training checkpoint
    "teacher.backbone.",
    "state_dict.module.base_encoder.",  # MoCo v3
    "state_dict.base_encoder.",
    "model.encoder.",  # MoBY
    "state_dict.module.backbone.",
    "state_dict.module.encoder.",  # SimSiam
    "state_dict.backbone.",  # solo-learn, mmdetection
    "model.module.backbone.",  # Barlow Twins, VICReg
    "model.backbone.",
    "module.backbone.",
    "backbone.",
    "state_dict.module.",
    "state_dict.",  # iBOT, DenseCL: the backbone alone
    "module.",  # SwAV
    "model.",  # Swin
    "teacher.",
    "",  # DINO, DINOv2, timm, torchvision, Barlow Twins, and this library's export
)
# Parts of names that identify a file's method, the most specific first.
METHODS = {
    "base_encoder.": "MoCo v3",
    "encoder_q.0.": "OpenSelfSup",
    "encoder_q.": "MoCo v2",
    "encoder_k.": "MoBY",
    "prototypes.": "SwAV",
    "ca_head.": "SelfPatch",
    "query_block.": "PQCL",
    "sere": "SERE",
    "decoder_embed.": "MAE",
    ".ls1.gamma": "DINOv2 or DeiT III",
    "masked_embed": "iBOT",
    "teacher.": "DINO",
}
FIRST_WEIGHTS = ("patch_embed.proj.weight", "conv1.weight")  # every backbone has one of them
# What decides whether a model computes what a file's network does. All other tensors must be in both.
# Names beside a backbone in a file: heads, decoders and predictors, which may be left out ...
BESIDE = re.compile(
    r"(head\w*|fc|fc_norm|norm2|query_block|attn_pool|fpn_\w+|pre_logits|classifier|prototypes|last_layer|optimizer|queue\w*"
    r"|\w*(decoder|projector|projection|predictor|sere)\w*)(\.|$)"
)
MAY_LEAVE_OUT = "cls_token"  # of a backbone, by a model whose summary of an image is another
# ... and names of a model that may start anew.
MAY_START_ANEW = re.compile(r"(backbone\.)?mask_token|summary\..*|.*\.num_batches_tracked")
# What other transformers have and ours do not: without it a network computes another function.
FOREIGN = {
    "rotary positions": r"(.*\.)?rope\w*(\.|$)|.*\.freqs$",
    "register tokens": r"(reg_tokens?|register_tokens?|storage_tokens)$",
    "a distillation token": r"dist_token$",
    "norms of queries and keys": r"blocks\.\d+\.attn\.[qk]_norm\.",
    "norms inside of attention or MLP": r"blocks\.\d+\.(attn|mlp)\.norm\.",
    "gated MLPs (SwiGLU)": r"blocks\.\d+\.mlp\.(w1|w2|w3|w12|fc1_[gx])\.",
    "relative position biases": r"(blocks\..*|rel_pos_bias\.)relative_position",
    "layer scales as in BEiT, EVA and DINOv3": r"blocks\.\d+\.gamma_\d$",
    "separate projections of queries, keys and values": r"blocks\.\d+\.attn\.([qkv]_bias$|[qkv]_proj\.)",
    "masked biases of queries, keys and values": r"blocks\.\d+\.attn\.qkv\.bias_mask$",
    "a norm before the blocks": r"(norm_pre|ln_pre)\.",
    "a stem of three convolutions (ResNet-C or ResNet-D)": r"(.*\.)?conv1\.0\.weight$",
    "squeeze and excitation": r"layer\d\.\d+\.se\.",
    "the attention of Swin V2": r"layers\.\d+\.blocks\.\d+\.attn\.(logit_scale|cpb_mlp)",
    "the layout of OpenAI's CLIP": r"(class_embedding|positional_embedding)$|transformer\.resblocks\.",
}


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """The weights of a branch in a file."""

    layout: str  # the method of the file, and the prefix of the backbone in it
    weights: dict[str, Tensor]  # the backbone's under timm's names; SelfPatch's aggregation head's after "summary."
    beside: list[str]  # names of heads, decoders and predictors after the same prefix


def read_published(path: Path) -> PublishedWeights:
    """Reads a .pth or .safetensors file. Nothing in it is executed."""
    flat = read_tensors(path)
    prefix = next((p for p in PREFIXES if any(f"{p}{first}" in flat for first in FIRST_WEIGHTS)), None)
    if prefix is None:
        _refuse_foreign(flat, path)
        names = " or ".join(FIRST_WEIGHTS)
        rule = f"A file of weights must hold a ViT, Swin or ResNet backbone under names that end in {names}"
        got = f"{len(flat)} tensors such as {sorted(flat)[:3]} in {path}"
        raise ValueError(sentence(rule, got, "pass the file that holds the backbone"))
    method = next((method for mark, method in METHODS.items() if any(mark in name for name in flat)), "timm")
    branch = {name.removeprefix(prefix): tensor for name, tensor in flat.items() if name.startswith(prefix)}
    beside = [name for name in branch if BESIDE.match(name) or (name == "mask_token" and method == "MAE")]
    backbone = _vit_names({name: tensor for name, tensor in branch.items() if name not in beside}, path)
    summary = _aggregation_head(flat, prefix.removesuffix("backbone."))
    backbone = {name: tensor for name, tensor in backbone.items() if not name.startswith("ca_head.")}
    _refuse_foreign(backbone, path)
    weights = _swin_names(backbone) | summary
    check_weights(weights, path)
    layout = f"{method}, {prefix.rstrip('.') or 'the backbone alone'}"
    return PublishedWeights(layout, _fold_layer_scale(weights, path), beside)


def without_ones(shape: Iterable[int]) -> list[int]:
    """The sides of a shape that count: a token is [D], [1, D] or [1, 1, D]."""
    return [side for side in shape if side != 1]


def _refuse_foreign(weights: Mapping[str, Tensor], path: Path) -> None:
    """Names what a network has that no backbone of this library computes."""
    found = {part: [name for name in weights if re.match(names, name)] for part, names in FOREIGN.items()}
    got = ", ".join(f"{part} ({names[0]})" for part, names in found.items() if names)
    rule = "A file of weights must be of a plain ViT, Swin or ResNet, which compute all that its network does"
    remedy = "start from weights without them; to evaluate this network, pass timm's name of it"
    check(not got, rule, f"{got} in {path}", remedy)


def _vit_names(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Renames iBOT's mask token and DINOv2's blocks in chunks, blocks.<chunk>.<number>."""
    names = {name: re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in weights}
    renamed = {names[name].replace("masked_embed", "mask_token"): tensor for name, tensor in weights.items()}
    rule, got = "Each tensor of a backbone must have one name", f"{len(weights) - len(renamed)} with two in {path}"
    check(len(renamed) == len(weights), rule, got, "save the state dict of the model")
    return renamed


def _fold_layer_scale(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """DINOv2 multiplies each branch by gamma; multiplying its last layer instead gives the same function."""
    folded = dict(weights)
    for name, gamma in weights.items():
        match = re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", name)
        if not match:
            continue
        last = match[1] + {"1": "attn.proj.", "2": "mlp.fc2."}[match[2]]
        del folded[name]
        for part in ("weight", "bias"):
            layer = weights.get(f"{last}{part}")
            fits = layer is not None and layer.ndim > 0 and gamma.shape == layer.shape[:1]
            got = (
                f"{tuple(gamma.shape)} for {name} and {None if layer is None else tuple(layer.shape)} for {last}{part}"
            )
            check(
                fits, "A layer scale must fit its layer", f"{got} in {path}", "save the state dict of the whole model"
            )
            assert layer is not None
            folded[f"{last}{part}"] = layer.float() * gamma.float().view(-1, *[1] * (layer.ndim - 1))
    check_weights({name: tensor for name, tensor in folded.items() if tensor is not weights[name]}, path)
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
