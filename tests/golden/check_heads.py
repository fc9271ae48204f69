"""Projection heads and the class-attention summary against the recorded DINO, iBOT and SelfPatch ones."""

import torch
from harness import HEAD_NAMES, SUMMARY_NAMES, Case, check, linear_layers, renamed, skip_unsupported, summary_depth
from rounding import RoundingBounds

from patchlight.heads.projection import ACTIVATIONS, ProjectionHead
from patchlight.heads.prototypes import Prototypes
from patchlight.heads.summary import ClassAttentionBlock, ClassAttentionSummary
from patchlight.objectives.interface import NeighborRule
from patchlight.records import Tokens
from patchlight_kernels import class_attention, force

FORWARD, GRADIENT = 1e-5, 2e-5
BLOCK_NAMES = {r"attn\.": ""}
HIDDEN_NORMS = {None: None, "ln": "layer", "bn": "batch", "syncbn": "batch"}


def close_gradients(
    case: Case, module: torch.nn.Module, names: dict[str, str], bounds: RoundingBounds, group: str = "grad.weight."
) -> None:
    """Compares exactly the recorded gradients of a group with ours, and clears ours.

    A gradient that exact arithmetic makes zero, as of a key's bias, is held to the bound of its rounding alone.
    """
    theirs = {ours: recorded for recorded in case.under(group) for ours in renamed({recorded: None}, names)}
    ours = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert set(ours) == set(theirs), f"{case.name}: {set(ours) ^ set(theirs)}"
    for name, gradient in ours.items():
        case.close(group + theirs[name], gradient, rel=0.0 if name in bounds else GRADIENT, floor=bounds.get(name, 0.0))
    bounds.clear_gradients()
    module.zero_grad()


def recorded_head(case: Case, hidden_norm: str | None) -> ProjectionHead:
    case.skip_unless(last_norm=None, normalize_eps=1e-12, bn_eps=1e-5, bn_momentum=0.1)
    config, weights = case.config, case.under("weight.")
    width, train_norm = config["bottleneck_dim"], not config["norm_last_layer"]
    if not width:
        skip_unsupported("a head without a bottleneck")
    if (activation := config.get("act", "gelu")) not in ACTIVATIONS:
        skip_unsupported(f"the activation {activation} in a head")
    separate = not config.get("shared_head", True)
    head = ProjectionHead(
        config["in_dim"],
        bottleneck=width,
        hidden=config["hidden_dim"],
        layers=linear_layers(weights, "mlp."),
        prototypes=Prototypes(width, config["out_dim"], train_norm),
        patch_prototypes=Prototypes(width, config["patch_out_dim"], train_norm) if separate else None,
        hidden_norm=hidden_norm,
        activation=activation,
    )
    assert (head.patch_prototypes is head.prototypes) == (not separate)
    head.load_state_dict(renamed(weights, HEAD_NAMES), strict=True)
    return head


@check("dino_head")
def dino_head(case: Case) -> None:
    head = recorded_head(case, "batch" if case.config.get("use_bn") else None)
    bounds, x = RoundingBounds(head), case["input.x"].requires_grad_()
    logits = head.prototypes.logits(head(x))
    case.close("output.logits", logits, rel=FORWARD)
    for name, buffer in head.named_buffers():
        case.close(f"output.buffer_after.{name}", buffer, rel=FORWARD, floor=bounds.get(name, 0.0))
    logits.backward(case["input.grad_output"])
    case.close("grad.input.x", x.grad, rel=GRADIENT)
    close_gradients(case, head, HEAD_NAMES, bounds)


@check("ibot_head")
def ibot_head(case: Case) -> None:
    norm, layers = case.config.get("norm"), linear_layers(case.under("weight."), "mlp.")
    if norm not in HIDDEN_NORMS:
        skip_unsupported(f"the norm {norm} in a head")
    if HIDDEN_NORMS[norm] == "batch" and layers > 2:
        skip_unsupported("a BatchNorm that several hidden layers share")
    head = recorded_head(case, HIDDEN_NORMS[norm])
    bounds, tokens = RoundingBounds(head), case["input.tokens"].requires_grad_()
    z = head(tokens)
    cls, patch = head.prototypes.logits(z[:, 0]), head.patch_prototypes.logits(z[:, 1:])
    case.close("output.cls", cls, rel=FORWARD)
    case.close("output.patch", patch, rel=FORWARD)
    torch.autograd.backward([cls, patch], [case["input.grad_output.cls"], case["input.grad_output.patch"]])
    case.close("grad.input.tokens", tokens.grad, rel=GRADIENT)
    close_gradients(case, head, HEAD_NAMES, bounds)
    if "input.local_cls" in case:
        local = case["input.local_cls"].requires_grad_()
        logits = head.prototypes.logits(head(local))
        case.close("output.local_cls", logits, rel=FORWARD)
        logits.backward(case["input.grad_output.local_cls"])
        case.close("grad.input.local_cls", local.grad, rel=GRADIENT)
        close_gradients(case, head, HEAD_NAMES, bounds, "grad_local.weight.")


@check("selfpatch_ca_block")
def class_attention_block(case: Case) -> None:
    case.skip_unless(qkv_bias=True, layernorm_eps=1e-6, gelu="erf")
    block = ClassAttentionBlock(case.config["dim"], case.config["num_heads"], case.config["mlp_ratio"])
    block.load_state_dict(renamed(case.under("weight."), BLOCK_NAMES), strict=True)
    bounds = RoundingBounds(block)
    cls, patches = case["input.cls"].requires_grad_(), case["input.patches"].requires_grad_()
    out = block(patches, cls.squeeze(1)).unsqueeze(1)
    case.close("output.cls", out, rel=FORWARD)
    out.backward(case["input.grad_output"])
    case.close("grad.input.cls", cls.grad, rel=GRADIENT)
    case.close("grad.input.patches", patches.grad, rel=GRADIENT)
    close_gradients(case, block, BLOCK_NAMES, bounds)
    if "output.attention" in case:
        case.close("output.attention", attention_of(block, cls, patches), rel=FORWARD)


@torch.no_grad()
def attention_of(block: ClassAttentionBlock, cls: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """The block's probabilities [M, H, 1, 1+N], from one-hot values of the keys, as many at a time as a head is wide."""
    state, x = block.norm1(cls), block.norm1(patches)
    q, k_self, k = (block._split(project) for project in (block.q(state), block.k(state), block.k(x)))
    keys, width = 1 + x.shape[1], q.shape[-1]
    one_hot = torch.eye(keys, -(-keys // width) * width)[:, None].expand(-1, block.heads, -1).expand(len(x), -1, -1, -1)
    columns = [class_attention(q, k_self, part[:, :1], k, part[:, 1:]) for part in one_hot.split(width, dim=-1)]
    return torch.cat(columns, dim=-1)[..., :keys].transpose(1, 2)


def recorded_summary(case: Case, weights: dict[str, torch.Tensor]) -> ClassAttentionSummary:
    """As many blocks as there are weights for."""
    case.skip_unless(qkv_bias=True, layernorm_eps=1e-6)
    config = case.config
    head = ClassAttentionSummary(config["dim"], config["num_heads"], summary_depth(weights), config["mlp_ratio"])
    head.load_state_dict(renamed(weights, SUMMARY_NAMES), strict=True)
    return head


@check("selfpatch_head_loc")
def aggregation_head(case: Case) -> None:
    config, head = case.config, recorded_summary(case, case.under("weight."))
    bounds = RoundingBounds(head)
    for k in config["k"] or [None]:
        suffix = "" if k is None else f".k{k}"
        rule = None if k is None else NeighborRule(radius=config.get("window", 3) // 2, k=k)
        patches = case["input.patches"].clone().requires_grad_()
        with force(neighbor_topk="reference"):  # the op has cases of its own
            result = head(Tokens(None, patches, (config["grid"],) * 2), rule)
        patches_out = result.patches if k is None else result.aggregated
        tokens = torch.cat([result.summary[:, None], patches_out], dim=1)
        case.close(f"output.tokens{suffix}", tokens, rel=FORWARD)
        tokens.backward(case["input.grad_output"])
        case.close(f"grad.input.patches{suffix}", patches.grad, rel=GRADIENT)
        if case.under(f"grad.weight{suffix}."):  # not recorded for every k
            close_gradients(case, head, SUMMARY_NAMES, bounds, f"grad.weight{suffix}.")
        head.zero_grad()
        bounds.clear_gradients()
