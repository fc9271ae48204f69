"""Cases, inputs and costs of prototype_ce."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from ...registry import Case, OpSpec, generator, observe_loss
from .op import OP, prototype_ce


def _case(
    students: int,
    teachers: int,
    rows: int,
    width: int,
    prototypes: int,
    *,
    bias: bool = True,
    equal: bool = False,
    small: bool = False,
    products: str | None = None,
    on_device: bool = False,
) -> Case:
    """`equal`: all pairs and rows weigh the same, as in most libraries. `on_device`: the teacher's temperature is a tensor."""
    name = f"S{students}-T{teachers}-R{rows}-D{width}-K{prototypes}" + ("" if bias else "-unbiased")
    name += (f"-{products}" if products else "") + ("-temperature" if on_device else "")
    sizes = {"students": students, "teachers": teachers, "rows": rows, "width": width, "prototypes": prototypes}
    return Case(name, {**sizes, "bias": bias, "equal": equal, "products": products, "on_device": on_device}, small)


TESTS = (
    _case(2, 2, 3, 3, 5),
    _case(3, 2, 5, 37, 67),  # primes, rows that are not 16-byte aligned, a second tile of three prototypes
    _case(1, 1, 17, 24, 130, bias=False),
    _case(1, 1, 2, 72, 300),  # several tiles and chunks for a block: its stages are filled a second time
    _case(1, 1, 1, 1, 1),  # one of everything: the loss is 0
    _case(1, 3, 2, 8, 64),  # more teachers than students, one full tile
    _case(5, 1, 18, 16, 40),
    _case(3, 2, 5, 37, 67, products="fp16", on_device=True),
    _case(2, 1, 17, 24, 130, products="fp16x3", on_device=True),
    _case(1, 1, 40, 24, 200, bias=False, products="fp16"),
    _case(0, 1, 3, 8, 5),  # no views, no rows, no channels
    _case(2, 0, 3, 8, 5),
    _case(2, 1, 0, 8, 5),
    _case(2, 1, 3, 0, 5),  # every logit is 0
)

BENCHES = (
    _case(1, 1, 2048, 256, 4096, equal=True, small=True),
    _case(10, 2, 16, 256, 8192, equal=True, small=True),
    _case(10, 2, 64, 256, 65536, equal=True),
    _case(10, 2, 128, 256, 65536, equal=True),
    _case(1, 1, 43520, 256, 4096, equal=True),
    _case(1, 1, 12672, 256, 8192, equal=True),
)

# What fp32 rows run on a GPU: cuBLAS's products beside kernels that read them, for whole rows and for some prototypes; and
# kernels that multiply.
COMPILED = tuple(
    _case(*sizes, equal=True, products=products, on_device=True)
    for sizes in ((1, 1, 512, 256, 4096), (10, 2, 16, 256, 65536), (10, 2, 16, 256, 4096))
    for products in ("fp16", "fp16x3")
)


def _inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """Unit vectors, as from a head; students have the teacher's images, so the two are similar."""
    s = case.sizes
    draws = generator(seed, s["rows"], s["prototypes"])
    random = lambda *shape: torch.randn(*shape, generator=draws)
    rows = random(s["rows"], s["width"])
    views = lambda count: normalize(rows + random(count, s["rows"], s["width"]), dim=-1).to(device, dtype)
    prototypes = random(s["prototypes"], s["width"])
    directions = lambda: normalize(prototypes + 0.3 * random(s["prototypes"], s["width"]), dim=-1).to(device, dtype)
    pair_weight = random(s["teachers"], s["students"]).abs() / max(1, s["teachers"] * s["students"])
    if min(s["teachers"], s["students"]) > 1:
        pair_weight.fill_diagonal_(0)  # no pair of a view with itself
    row_weight = lambda: random(s["rows"]).abs() / max(1, s["rows"])
    if s.get("equal"):
        pair_weight = (pair_weight > 0) / (pair_weight > 0).sum()
        row_weight = lambda: torch.full((s["rows"],), 1 / s["rows"])
    how = {"products": s["products"]} if s.get("products") else {}
    return {
        "z": views(s["students"]),
        "prototypes": directions(),
        "teacher_z": views(s["teachers"]),
        "teacher_prototypes": directions(),
        "temperature": 0.1,
        "teacher_temperature": torch.tensor(0.05, dtype=torch.float64, device=device) if s.get("on_device") else 0.05,
        "pair_weight": pair_weight.to(device),
        "row_weight": row_weight().to(device),
        "bias": (0.05 * random(s["prototypes"])).to(device) if s["bias"] else None,
        **how,
    }


def _min_bytes(case: Case, dtype: torch.dtype) -> int:
    """Every row and prototype read once."""
    s = case.sizes
    views = s["students"] + s["teachers"]
    return (views * s["rows"] + 2 * s["prototypes"]) * s["width"] * dtype.itemsize


def _product(case: Case) -> int:
    """The logits of one view."""
    s = case.sizes
    return 2 * s["rows"] * s["prototypes"] * s["width"]


def _flops(case: Case) -> int:
    """Both branches' logits."""
    return (case.sizes["students"] + case.sizes["teachers"]) * _product(case)


def _backward_flops(case: Case) -> int:
    """The gradient of the student's logits, times rows and times prototypes."""
    return 2 * case.sizes["students"] * _product(case)


SPEC = OpSpec(
    op=OP,
    public=prototype_ce,
    tests=TESTS,
    benches=BENCHES,
    compiled=COMPILED,
    inputs=_inputs,
    min_bytes=_min_bytes,
    flops=_flops,
    backward_flops=_backward_flops,
    observe=observe_loss,
    differentiable=("z", "prototypes"),
)
