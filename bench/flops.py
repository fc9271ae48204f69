"""How many FLOPs a call needs, by one rule for all that are compared.

The rule: two for every multiplication of a matrix product or a convolution that runs, forward and backward, student and
teacher; none for what works element by element (norms, softmaxes, sampling, optimizer). Attention needs two products forward
and four backward over the pairs of tokens that attend, and each of our own ops what its spec says: what an implementation
computes a second time to save memory is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchlight_kernels import registry
from patchlight_kernels.registry import Case

Shape = tuple[int, ...]
SDPA = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")


def flops_of(call: Callable[[], object]) -> int:
    """Runs the call once and counts its FLOPs."""
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        call()
    return counter.get_total_flops()


def formulas() -> dict[object, Callable]:
    """For what the counter does not know, or counts by another rule. A formula gets shapes in place of tensors."""
    ours = {getattr(torch.ops.patchlight, name): formula for name, formula in OP_FORMULAS.items()}
    packets = {f"_scaled_dot_product_{kind}{end}" for kind in SDPA for end in ("", "_backward")}
    known = {name for name in packets if hasattr(torch.ops.aten, name)}
    attention: dict[bool, Callable] = {True: attention_backward, False: attention_forward}
    return {**ours, **{getattr(torch.ops.aten, name): attention[name.endswith("_backward")] for name in known}}


def attention_forward(q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return 4 * prod(q) * k[-2]


def attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return 2 * attention_forward(q, k, v)


def op_flops(op: str, sizes: dict[str, Any], forward: bool, backward: bool) -> int:
    """The FLOPs that the op's spec states for these sizes."""
    spec, case = registry.spec(op), Case(op, sizes)
    alone, both = (spec.least_flops(case, backward) for backward in (False, True))
    return forward * alone + backward * (both - alone)


def neighbor_topk_fwd(x: Shape, height: int, width: int, k: int, radius: int, *_, **__) -> int:
    sizes = {"images": x[0], "channels": x[2], "grid": (height, width), "radius": None if radius < 0 else radius}
    return op_flops("neighbor_topk", sizes, forward=True, backward=False)


def class_attention(out: Shape, k_patches: Shape, index: Shape | None, backward: bool) -> int:
    images, states, heads, width = out
    sizes: dict[str, Any] = {"images": images, "states": states, "heads": heads, "width": width}
    sizes |= {"patches": k_patches[1], "k": None if index is None else index[2]}
    return op_flops("class_attention", sizes, not backward, backward)


def class_attention_fwd(q, k_self, v_self, k_patches, v_patches, index, *, out_shape, **_) -> int:
    return class_attention(out_shape[0], k_patches, index, backward=False)


def class_attention_bwd(grad, q, k_self, v_self, k_patches, v_patches, index, *_, **__) -> int:
    return class_attention(grad, k_patches, index, backward=True)


def prototype_ce(z: Shape, prototypes: Shape, teacher_z: Shape, forward: bool, backward: bool) -> int:
    sizes = {"students": z[0], "rows": z[1], "width": z[2], "teachers": teacher_z[0], "prototypes": prototypes[0]}
    return op_flops("prototype_ce", sizes, forward, backward)


def prototype_ce_fwd(z, prototypes, teacher_z, *others, **_) -> int:
    return prototype_ce(z, prototypes, teacher_z, forward=True, backward=others[-1])  # may compute the gradients too


def prototype_ce_bwd(
    grad_loss, log2_student, log2_teacher, dz, dprototypes, scale, z, prototypes, teacher_z, *others, **_
) -> int:
    return prototype_ce(z, prototypes, teacher_z, forward=False, backward=not others[-1])


def self_relation(student: Shape, teacher: Shape, forward: bool, backward: bool) -> int:
    views, images, heads, rows, width = student
    sizes = {"views": views, "images": images, "heads": heads, "rows": rows, "width": width}
    return op_flops("self_relation", sizes | {"teacher_width": teacher[-1]}, forward, backward)


def self_relation_fwd(student, teacher, *others, **_) -> int:
    return self_relation(student, teacher, forward=True, backward=others[-1])


def self_relation_bwd(grad_loss, log2_student, log2_teacher, dstudent, student, teacher, *others, **_) -> int:
    return self_relation(student, teacher, forward=False, backward=not others[-1])


def query_attention(qkv: Shape, raw: int, crop: int, backward: bool) -> int:
    images, tokens, _, heads, width = qkv
    sizes: dict[str, Any] = {"images": images, "raw": raw, "queries": tokens - raw, "heads": heads, "width": width}
    sizes |= {"query_keys": "all" if crop else "raw", "crop": crop}
    return op_flops("query_attention", sizes, not backward, backward)


def query_attention_fwd(qkv, raw, crop, **_) -> int:
    return query_attention(qkv, raw, crop, backward=False)


def query_attention_bwd(grad, qkv, out, lse, raw, crop, **_) -> int:
    return query_attention(qkv, raw, crop, backward=True)


OP_FORMULAS: dict[str, Callable] = {
    formula.__name__: formula
    for formula in (
        neighbor_topk_fwd,
        class_attention_fwd,
        class_attention_bwd,
        prototype_ce_fwd,
        prototype_ce_bwd,
        self_relation_fwd,
        self_relation_bwd,
        query_attention_fwd,
        query_attention_bwd,
    )
}
