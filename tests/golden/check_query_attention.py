"""PQCL's recorded attention: projections, the op in every implementation, the output projection, and all gradients."""

import torch.nn.functional as F
from harness import Case, check
from parity import HAS_GPU, running
from torch import Tensor, cat

from patchlight_kernels import query_attention

REL = 2e-5


def compare(case: Case, query_keys: str) -> None:
    heads, raw = int(case.meta["num_heads"]), case["x"].shape[1]
    leaves = {
        key: case[key].clone().requires_grad_()
        for key in ("x", "y", *(f"weight.{name}" for name in case.under("weight.")))
    }
    weight = lambda name: (leaves[f"weight.{name}.weight"], leaves[f"weight.{name}.bias"])
    tokens: Tensor = cat([leaves["x"], leaves["y"]], dim=1)
    qkv = F.linear(tokens, *weight("qkv")).unflatten(-1, (3, heads, -1))
    out = F.linear(query_attention(qkv, raw, query_keys).flatten(2), *weight("proj"))
    case.close("out_x", out[:, :raw], REL)
    case.close("out_y", out[:, raw:], REL)
    out.backward(cat([case["cotangent_x"], case["cotangent_y"]], dim=1))
    for key, leaf in leaves.items():
        floor = 1e-6 if key == "weight.qkv.bias" else 0.0  # a third of it is zero in exact arithmetic
        case.close(f"grad_{key}" if key in ("x", "y") else key.replace("weight.", "grad.", 1), leaf.grad, REL, floor)


def in_every_implementation(case: Case, query_keys: str) -> None:
    for name in ("reference", "cpp", "cuda") + (() if HAS_GPU else ("triton",)):
        with running("cpu", name):
            compare(case, query_keys)


@check("pqcl_official_attention")
def as_released(case: Case) -> None:
    in_every_implementation(case, "all")


@check("pqcl_derived_attention_rawonly")
def the_narrow_reading(case: Case) -> None:
    in_every_implementation(case, "raw")
