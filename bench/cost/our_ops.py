"""What our own operations launch: counted nodes, as no kernels are loaded for a GPU that is not there.

How many kernels each form launches is written down here, from the profiles and the launchers; bytes are those of all operands
and results once, FLOPs what the specs state. A form that computes something twice is slower, not larger.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from patchlight_kernels.dispatch import ops
from patchlight_kernels.ops.prototype_ce import pieces

from ..flops import OP_FORMULAS
from .records import ATTENTION, PRODUCTS_16, PRODUCTS_32, Call, Kernel, bytes_of

# Launches of an operation by its direction and form: the first number always, the second for each piece of the backward. Those of
# "torch" are read from PyTorch's source, and are in no profile yet.
LAUNCHES = {
    ("adamw_fwd", "cuda"): (2, 0),
    ("adamw_fwd", "triton"): (2, 0),
    ("square_sums_fwd", "cuda"): (2, 0),
    ("square_sums_fwd", "triton"): (2, 0),
    ("class_attention_fwd", "cuda"): (1, 0),
    ("class_attention_fwd", "triton"): (1, 0),
    ("class_attention_bwd", "cuda"): (4, 0),
    ("class_attention_bwd", "triton"): (4, 0),
    ("neighbor_topk_fwd", "cuda"): (1, 0),
    ("neighbor_topk_fwd", "triton"): (1, 0),
    ("photometric_fwd", "cuda"): (3, 0),
    ("photometric_fwd", "triton"): (3, 0),
    ("prototype_ce_fwd", "cuda"): (5, 0),
    ("prototype_ce_fwd", "triton"): (5, 0),
    ("prototype_ce_bwd", "cuda"): (8, 10),
    ("prototype_ce_bwd", "triton"): (8, 10),
    ("block_masks_fwd", "cuda"): (1, 0),
    ("block_masks_fwd", "triton"): (1, 0),
    ("query_attention_fwd", "cuda"): (1, 0),
    ("query_attention_fwd", "triton"): (1, 0),
    ("query_attention_fwd", "torch"): (6, 0),
    ("query_attention_bwd", "cuda"): (3, 0),
    ("query_attention_bwd", "triton"): (3, 0),
    ("query_attention_bwd", "torch"): (18, 0),
    ("self_relation_fwd", "cuda"): (4, 0),
    ("self_relation_fwd", "triton"): (4, 0),
    ("self_relation_bwd", "cuda"): (2, 0),
    ("self_relation_bwd", "triton"): (2, 0),
}
DEFAULT = (1, 0)


def kernels_of_our_op(call: Call) -> Iterator[Kernel]:
    """The first kernel has all bytes and FLOPs, and the others only their launches."""
    name = call.name.removeprefix("patchlight.")
    if name == "prototype_ce_fwd" and (found := in_chunks(call)):
        yield from found
        return
    form = chosen_form(call, name)
    kind, flop_kind = f"{name} {form}", ATTENTION
    if name.startswith("prototype_ce"):
        wide = call.argument("z").element_size() == 4
        kind, flop_kind = f"{kind} {'fp32' if wide else '16 bit'}", PRODUCTS_32 if wide else PRODUCTS_16
    yield Kernel(
        call.name, kind, bytes_of([*call.given, *call.returned, *call.changed]), flops_of(call, name), flop_kind
    )
    once, per_piece = LAUNCHES.get((name, form), DEFAULT)
    for _ in range(once + per_piece * pieces_of(call, name) - 1):
        yield Kernel(call.name + " more", "small")


def in_chunks(call: Call) -> list[Kernel]:
    """The kernels of prototype_ce where fp16 factors are multiplied by cuBLAS, chunk by chunk; none where they are not."""
    z, prototypes, teacher_z = (call.argument(name) for name in ("z", "prototypes", "teacher_z"))
    products, gradients = call.argument("products"), call.argument("gradients")
    (views, rows, width), count, teachers = z.shape, len(prototypes), len(teacher_z)
    if pieces.way(views, rows, count, products) != "chunks":
        return []
    of_pair = 4 * (views + teachers) + 2 * views
    row_step, prototype_step = pieces.steps(views, rows, count, pieces.CHUNK // of_pair)
    whole = prototype_step == count <= pieces.WHOLE_ROWS // (teachers + 1)
    chunks = ceil(rows / row_step) * ceil(count / prototype_step)
    pairs, passes = rows * count, 1 if whole or not gradients else 2
    dots, of_gradients = 2 * width * pairs * (views + teachers) * passes, 4 * width * pairs * views * gradients
    moved = pairs * (4 * (views + teachers) * passes + 2 * views * gradients)
    cut = "rows" if whole else "prototypes"
    first = [
        Kernel(
            call.name,
            f"prototype_ce chunk products, {cut} cut",
            0,
            dots + of_gradients,
            PRODUCTS_16,
        ),
        Kernel(call.name + " passes", "prototype_ce chunk passes", moved),
    ]
    launches = 12 + (5 if whole else 8) * chunks
    return first + [Kernel(call.name + " more", "part")] * (launches - len(first))


def flops_of(call: Call, name: str) -> int:
    """By the spec."""
    if name not in OP_FORMULAS:
        return 0
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in call.args]
    return OP_FORMULAS[name](*shapes, **call.kwargs, out_shape=[tuple(x.shape) for x in call.returned])


def pieces_of(call: Call, name: str) -> int:
    if name != "prototype_ce_bwd":
        return 0
    z, prototypes = call.argument("z"), call.argument("prototypes")
    return ceil(z.shape[0] * z.shape[1] * prototypes.shape[0] / pieces.PIECE)


def chosen_form(call: Call, name: str) -> str:
    """The implementation that a GPU would run, by the operation's own rules, which take the arguments of its forward."""
    own, suffix = name.rsplit("_", 1)
    op = ops()[own]
    forward = getattr(torch.ops.patchlight, f"{own}_fwd").default._schema.arguments
    try:
        args = [call.argument(argument.name) for argument in forward]
        return op.choose(*args, direction="backward" if suffix == "bwd" else "forward").name
    except (RuntimeError, ValueError):  # one is forced that a GPU does not have, or the backward has other arguments
        return op.impls[0].name


def gpu_has_everything() -> list[tuple]:
    """Stand-ins for the questions that forms ask about a GPU: a Hopper with the library of kernels and Triton."""
    hardware = importlib.import_module("patchlight_kernels.hardware")
    architecture = lambda tensor: "sm_90" if tensor.device.type == "cuda" else None
    none = ("no_cuda_library", "no_triton", "too_little_shared_memory", "gpu_too_old")
    return [(hardware, "architecture", architecture), *((hardware, name, lambda *_: None) for name in none)]
