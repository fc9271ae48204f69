"""Backbones against the recorded DINO, iBOT and SelfPatch vision transformers."""

import torch
from harness import Case, check

from patchlight.backbones.vit import VisionTransformer, drop_path


def recorded_vit(case: Case, class_token: bool) -> VisionTransformer:
    config = case.config
    vit = VisionTransformer(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch_size=config["patch_size"],
        image_size=config["img_size"],
        mlp_ratio=config["mlp_ratio"],
        class_token=class_token,
    )
    weights = case.under("weight.")
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
    tokens = vit(pixels, layers=(0,))
    assert tokens.grid == (case.config["height"] // 8, case.config["width"] // 8)
    everything = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
    case.close("output.tokens", everything, rel=1e-5)
    case.close("output.cls", tokens.cls, rel=1e-5)
    case.close("output.tokens_after_block0_normed", tokens.layers[0], rel=1e-5)
    case.close("output.pos_embed_used", vit.positions(tokens.grid), rel=1e-5)
    case.close("output.last_attention", vit.attention_map(pixels), rel=1e-5)
    everything.backward(case["input.grad_output.tokens"])
    close_gradients(case, vit, pixels)


@check("ibot_vit_masked")
def ibot_vit(case: Case) -> None:
    vit = recorded_vit(case, class_token=True)
    pixels = case["input.images"].requires_grad_()
    mask = case["input.mask"].flatten(1)
    assert mask[0].any()
    assert not mask[-1].any()
    tokens = vit(pixels, mask)
    everything = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
    case.close("output.tokens", everything, rel=1e-5)
    everything.backward(case["input.grad_output.tokens"])
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
    vit = VisionTransformer(width=case.config["dim"], depth=1, heads=1, patch_size=case.config["patch_size"])
    targets = sorted(case.under("output.pos_embed."))
    assert len(targets) == 3
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
