"""PQCL's recorded attention: projections, the op in every implementation, the output projection, and all gradients."""

import torch
import torch.nn.functional as F
from harness import Case, check
from parity import HAS_GPU, running
from rounding import key_roundings, key_terms, rounding_bound
from torch import Tensor, cat

from patchlight_kernels import query_attention

REL = 2e-5


def compare(case: Case, query_keys: str) -> None:
    heads, raw = int(case.meta["num_heads"]), case["x"].shape[1]
    leaves = {
        key: case[key].clone().requires_grad_()
        for key in ("x", "y", *(f"weight.{name}" for name in case.under("weight.")))
    }
    weight = lambda name: (leaves[f"weight.{name}.weight"], leaves.get(f"weight.{name}.bias"))
    tokens: Tensor = cat([leaves["x"], leaves["y"]], dim=1)
    qkv = F.linear(tokens, *weight("qkv")).unflatten(-1, (3, heads, -1))
    attended = query_attention(qkv, raw, query_keys)
    attended.retain_grad()
    out = F.linear(attended.flatten(2), *weight("proj"))
    case.close("out_x", out[:, :raw], REL)
    case.close("out_y", out[:, raw:], REL)
    out.backward(cat([case["cotangent_x"], case["cotangent_y"]], dim=1))
    for key, leaf in leaves.items():
        recorded = f"grad_{key}" if key in ("x", "y") else key.replace("weight.", "grad.", 1)
        if key != "weight.qkv.bias":
            case.close(recorded, leaf.grad, REL)
            continue
        floor = (REL * case[recorded].abs().max().item()) * torch.ones(3, leaf.shape[0] // 3, dtype=torch.float64)
        floor[1] = key_bias_bound(qkv, attended.grad, raw, query_keys)  # zero in exact arithmetic
        case.close(recorded, leaf.grad, rel=0.0, floor=floor.flatten())


def key_bias_bound(qkv: Tensor, dout: Tensor, raw: int, query_keys: str) -> Tensor:
    """How large rounding may make the gradient of the keys' bias, [H * E]."""
    images, tokens, *_, width = qkv.shape
    q, k, v = qkv.detach().transpose(1, 3).unbind(2)  # [M, H, T, E]
    per_query = lambda x: x.unsqueeze(2).expand(-1, -1, tokens, -1, -1)
    is_raw = torch.arange(tokens) < raw
    visible = is_raw | (~is_raw.unsqueeze(1) if query_keys == "all" else is_raw)
    terms = key_terms(q, per_query(k), per_query(v), dout.transpose(1, 2), visible)
    return rounding_bound(terms.sum(dim=(0, 2)).flatten(), key_roundings(images * tokens, tokens, width), dout.dtype)


def in_every_implementation(case: Case, query_keys: str) -> None:
    for name in ("reference", "cpp", "cuda") + (() if HAS_GPU else ("triton",)):
        with running("cpu", name):
            compare(case, query_keys)


@check("pqcl_official_attention")
def as_released(case: Case) -> None:
    in_every_implementation(case, "all")


@check("pqcl_derived_attention_rawonly")
def raw_keys_only(case: Case) -> None:
    in_every_implementation(case, "raw")
