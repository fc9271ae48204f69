"""Projection heads and the class-attention summary against the recorded DINO, iBOT and SelfPatch ones."""

import torch
from harness import Case, check

from patchlight.heads.projection import ProjectionHead
from patchlight.heads.prototypes import Prototypes
from patchlight.heads.summary import ClassAttentionBlock, ClassAttentionSummary
from patchlight.objectives.interface import NeighborRule
from patchlight.records import Tokens
from patchlight_kernels import class_attention, force

FORWARD, GRADIENT = 1e-5, 2e-5
NOISE = 1e-5  # for gradients that are zero on paper and rounding noise when recorded
OUR_NAMES = {"last_layer.": "prototypes.", "last_layer2.": "own_patch_prototypes."}


def renamed(weights: dict, names: dict[str, str]) -> dict:
    """The same tensors with the first matching prefix replaced."""
    result = {}
    for name, value in weights.items():
        prefix = next((old for old in names if name.startswith(old)), "")
        result[names.get(prefix, "") + name[len(prefix) :]] = value
    return result


def close_gradients(case: Case, module: torch.nn.Module, names: dict[str, str], group: str = "grad.weight.") -> None:
    """Every recorded gradient of a group against ours, none more and none less; clears ours."""
    theirs = {name: group + recorded for recorded in case.under(group) for name in renamed({recorded: None}, names)}
    ours = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert set(ours) == set(theirs), f"{case.name}: {set(ours) ^ set(theirs)}"
    for name, gradient in ours.items():
        case.close(theirs[name], gradient, rel=GRADIENT, floor=NOISE if is_zero_on_paper(name, module) else 0.0)
    module.zero_grad()


def is_zero_on_paper(name: str, module: torch.nn.Module) -> bool:
    """A key's bias shifts all scores alike; a bias in front of a batch norm is subtracted with the mean."""
    has_batch_norm = any(isinstance(child, torch.nn.BatchNorm1d) for child in module.modules())
    return name.endswith("k.bias") or (has_batch_norm and name in ("mlp.0.bias", "mlp.3.bias"))


def recorded_head(case: Case, hidden_norm: str | None = None, separate: bool = False) -> ProjectionHead:
    config = case.config
    width, train_norm = config["bottleneck_dim"], not config["norm_last_layer"]
    head = ProjectionHead(
        config["in_dim"],
        bottleneck=width,
        hidden=config["hidden_dim"],
        layers=config["nlayers"],
        prototypes=Prototypes(width, config["out_dim"], train_norm),
        patch_prototypes=Prototypes(width, config["patch_out_dim"], train_norm) if separate else None,
        hidden_norm=hidden_norm,
    )
    head.load_state_dict(renamed(case.under("weight."), OUR_NAMES), strict=True)
    return head


@check("dino_head")
def dino_head(case: Case) -> None:
    head = recorded_head(case, "batch" if case.config["use_bn"] else None)
    x = case["input.x"].requires_grad_()
    logits = head.prototypes.logits(head(x))
    case.close("output.logits", logits, rel=FORWARD)
    for name, buffer in head.named_buffers():
        case.close(f"output.buffer_after.{name}", buffer, rel=FORWARD)
    logits.backward(case["input.grad_output"])
    case.close("grad.input.x", x.grad, rel=GRADIENT)
    close_gradients(case, head, OUR_NAMES)


@check("ibot_head")
def ibot_head(case: Case) -> None:
    separate = not case.config["shared_head"]
    head = recorded_head(case, {None: None, "ln": "layer"}[case.config["norm"]], separate)
    assert (head.patch_prototypes is head.prototypes) == (not separate)
    tokens = case["input.tokens"].requires_grad_()
    z = head(tokens)
    cls, patch = head.prototypes.logits(z[:, 0]), head.patch_prototypes.logits(z[:, 1:])
    case.close("output.cls", cls, rel=FORWARD)
    case.close("output.patch", patch, rel=FORWARD)
    torch.autograd.backward([cls, patch], [case["input.grad_output.cls"], case["input.grad_output.patch"]])
    case.close("grad.input.tokens", tokens.grad, rel=GRADIENT)
    close_gradients(case, head, OUR_NAMES)
    if "input.local_cls" in case:
        local = case["input.local_cls"].requires_grad_()
        logits = head.prototypes.logits(head(local))
        case.close("output.local_cls", logits, rel=FORWARD)
        logits.backward(case["input.grad_output.local_cls"])
        case.close("grad.input.local_cls", local.grad, rel=GRADIENT)
        close_gradients(case, head, OUR_NAMES, "grad_local.weight.")


@check("selfpatch_ca_block")
def class_attention_block(case: Case) -> None:
    names = {"attn.": ""}
    block = ClassAttentionBlock(case.config["dim"], case.config["num_heads"], case.config["mlp_ratio"])
    block.load_state_dict(renamed(case.under("weight."), names), strict=True)
    cls, patches = case["input.cls"].requires_grad_(), case["input.patches"].requires_grad_()
    out, nothing = block(patches, cls)
    assert nothing is None
    case.close("output.cls", out, rel=FORWARD)
    out.backward(case["input.grad_output"])
    case.close("grad.input.cls", cls.grad, rel=GRADIENT)
    case.close("grad.input.patches", patches.grad, rel=GRADIENT)
    close_gradients(case, block, names)
    case.close("output.attention", attention_of(block, cls, patches), rel=FORWARD)


@torch.no_grad()
def attention_of(block: ClassAttentionBlock, cls: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """The block's probabilities [M, H, 1, 1+N], read out by giving every key a one-hot value, a head's width at a time."""
    state, x = block.norm1(cls), block.norm1(patches)
    q, k_self, k = (block._split(project) for project in (block.q(state), block.k(state), block.k(x)))
    keys, width = 1 + x.shape[1], q.shape[-1]
    one_hot = torch.eye(keys, -(-keys // width) * width)[:, None].expand(-1, block.heads, -1).expand(len(x), -1, -1, -1)
    columns = [class_attention(q, k_self, part[:, :1], k, part[:, 1:]) for part in one_hot.split(width, dim=-1)]
    return torch.cat(columns, dim=-1)[..., :keys].transpose(1, 2)


@check("selfpatch_head_loc")
def aggregation_head(case: Case) -> None:
    names = {f"cls_blocks.{number}.attn.": f"blocks.{number}." for number in (0, 1)} | {"cls_blocks.": "blocks."}
    config = case.config
    head = ClassAttentionSummary(config["dim"], config["num_heads"], mlp_ratio=config["mlp_ratio"])
    head.load_state_dict(renamed(case.under("weight."), names), strict=True)
    for k in config["k"] or [None]:
        suffix = "" if k is None else f".k{k}"
        patches = case["input.patches"].clone().requires_grad_()
        with force(neighbor_topk="reference"):  # the op has its own cases
            result = head(Tokens(None, patches, (config["grid"],) * 2), None if k is None else NeighborRule(k=k))
        normalised = result.patches if k is None else result.aggregated
        tokens = torch.cat([result.summary[:, None], normalised], dim=1)
        case.close(f"output.tokens{suffix}", tokens, rel=FORWARD)
        tokens.backward(case["input.grad_output"])
        case.close(f"grad.input.patches{suffix}", patches.grad, rel=GRADIENT)
        if k in (None, 1, 4):  # the others were not recorded
            close_gradients(case, head, names, f"grad.weight{suffix}.")
        head.zero_grad()
