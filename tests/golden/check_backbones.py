"""Backbones against the recorded DINO, iBOT and SelfPatch vision transformers."""

import re

import torch
from harness import Case, check

from patchlight.backbones.vit import VisionTransformer, attention_map, drop_path


def recorded_vit(case: Case, class_token: bool) -> VisionTransformer:
    case.skip_unless(layernorm_eps=1e-6, gelu="erf")
    config, weights = case.config, case.under("weight.")
    vit = VisionTransformer(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch_size=config["patch_size"],
        image_size=config["img_size"],
        mlp_ratio=config["mlp_ratio"],
        class_token=class_token,
        qkv_bias=config.get("qkv_bias", "blocks.0.attn.qkv.bias" in weights),
    )
    weights["mask_token"] = weights.pop("masked_embed", vit.mask_token.detach())
    vit.load_state_dict(weights, strict=True)
    return vit


def close_gradients(case: Case, vit: VisionTransformer, pixels: torch.Tensor) -> None:
    case.close("grad.input.images", pixels.grad, rel=2e-5)
    recorded = case.under("grad.weight.")
    ours = {name: parameter.grad for name, parameter in vit.named_parameters() if parameter.grad is not None}
    if "masked_embed" in recorded:
        ours["masked_embed"] = ours.pop("mask_token")
    assert set(ours) == set(recorded)
    for name, gradient in ours.items():
        case.close(f"grad.weight.{name}", gradient, rel=2e-5)


@check("dino_vit")
def dino_vit(case: Case) -> None:
    vit = recorded_vit(case, class_token=True)
    pixels = case["input.images"].requires_grad_()
    matches = (re.fullmatch(r"output\.tokens_after_block(\d+)_normed", key) for key in case.tensors)
    blocks = tuple(sorted(int(match[1]) for match in matches if match))
    tokens = vit(pixels, layers=blocks)
    assert tokens.grid == tuple(case.config[side] // case.config["patch_size"] for side in ("height", "width"))
    tokens_out = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
    case.close("output.tokens", tokens_out, rel=1e-5)
    for block, intermediate in zip(blocks, tokens.layers, strict=True):
        case.close(f"output.tokens_after_block{block}_normed", intermediate, rel=1e-5)
    others = {
        "cls": tokens.cls,
        "pos_embed_used": vit.positions(tokens.grid),
        "last_attention": attention_map(vit, pixels),
    }
    for key in others.keys() & case.under("output.").keys():
        case.close(f"output.{key}", others[key], rel=1e-5)
    tokens_out.backward(case["input.grad_output.tokens"])
    close_gradients(case, vit, pixels)


@check("ibot_vit_masked")
def ibot_vit(case: Case) -> None:
    vit = recorded_vit(case, class_token=True)
    pixels = case["input.images"].requires_grad_()
    tokens = vit(pixels, case["input.mask"].flatten(1))
    tokens_out = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
    case.close("output.tokens", tokens_out, rel=1e-5)
    tokens_out.backward(case["input.grad_output.tokens"])
    close_gradients(case, vit, pixels)


@check("selfpatch_vit")
def selfpatch_vit(case: Case) -> None:
    vit = recorded_vit(case, class_token=False)
    pixels = case["input.images"].requires_grad_()
    tokens = vit(pixels)
    assert tokens.cls is None
    case.close("output.tokens", tokens.patches, rel=1e-5)
    tokens.patches.backward(case["input.grad_output.tokens"])
    close_gradients(case, vit, pixels)


@check("dino_pos_embed_interp")
def position_resize(case: Case) -> None:
    width, patch = case.config["dim"], case.config["patch_size"]
    vit = VisionTransformer(width, depth=1, heads=1, patch_size=patch, image_size=patch * case.config["base_grid"])
    targets = sorted(case.under("output.pos_embed."))
    assert targets
    for target in targets:
        vit.pos_embed.data = case["weight.pos_embed"].clone()
        vit.pos_embed.grad = None
        positions = vit.positions(tuple(int(side) for side in target.split("x")))
        case.close(f"output.pos_embed.{target}", positions, rel=1e-5)
        positions.backward(case[f"input.grad_output.{target}"])
        case.close(f"grad.weight.pos_embed.{target}", vit.pos_embed.grad, rel=2e-5)


@check("dino_drop_path")
def stochastic_depth(case: Case) -> None:
    for rate in case.config["drop_prob"]:
        x = case["input.x"].clone().requires_grad_()
        y = drop_path(x, case[f"input.uniform.{rate}"], rate)
        case.close(f"output.y.{rate}", y, rel=1e-6)
        y.backward(case["input.grad_output"])
        case.close(f"grad.input.x.{rate}", x.grad, rel=1e-6)
