"""What is special about prototype_ce: its algebra, pieces and chunks, the backward of a GPU, ranges, errors."""

from __future__ import annotations

import math
import os
import shutil
import subprocess

import pytest
import torch
from parity import ROOT, SEED, assert_as_exact_as_pytorch, every_runner, needs_gpu, outcome, running, spread
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import normalize

from patchlight_kernels import force, prototype_ce, registry
from patchlight_kernels.ops.prototype_ce import factors, pieces, reference
from patchlight_kernels.registry import Case

SPEC = registry.spec("prototype_ce")
LEAVES = SPEC.differentiable
# Rounding in fp16, relative to the largest gradient: each of two results rounds its operands, its sum of products and itself.
UNITS = 2 * 3 * torch.finfo(torch.float16).eps


def some_arguments(
    students=3, teachers=2, rows=5, width=7, prototypes=11, dtype=torch.float32, device="cpu", **changes
):
    sizes = {"students": students, "teachers": teachers, "rows": rows, "width": width, "prototypes": prototypes}
    arguments = SPEC.inputs(Case("test", sizes | {"bias": True}), dtype, device, SEED)
    return arguments | changes


def with_gradients(arguments):
    """The loss and the gradients of z and of the prototypes."""
    leaves = {key: arguments[key].detach().requires_grad_() for key in LEAVES}
    loss = prototype_ce(**{**arguments, **leaves})
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))


def by_the_formula(
    z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, pair_weight, row_weight, bias
):
    """Every pair, every row, every probability written out."""
    loss = 0.0
    for t in range(len(teacher_z)):
        p = ((teacher_z[t] @ teacher_prototypes.T + bias) / teacher_temperature).softmax(-1)
        for s in range(len(z)):
            cross_entropy = -(p * (z[s] @ prototypes.T / temperature).log_softmax(-1)).sum(-1)
            loss = loss + pair_weight[t, s] * (row_weight * cross_entropy).sum()
    return loss


def double(arguments):
    return {
        key: value.detach().double().requires_grad_(key in LEAVES) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }


# ---------------------------------------------------------------------------------------------- the algebra


def test_the_reference_is_the_formula():
    arguments = double(some_arguments())
    loss = by_the_formula(**arguments)
    expected = loss.detach(), *torch.autograd.grad(loss, [arguments[key] for key in LEAVES])
    torch.testing.assert_close(with_gradients(arguments), expected)


def test_cross_entropy_is_linear_in_the_target():
    """CE = logsumexp - z . m / temperature with m the mean prototype under the teacher: attention with two tables."""
    a = double(some_arguments())
    p = ((a["teacher_z"] @ a["teacher_prototypes"].T + a["bias"]) / a["teacher_temperature"]).softmax(-1)
    m = p @ a["prototypes"]
    logits = a["z"] @ a["prototypes"].T / a["temperature"]
    pairs, rows = a["pair_weight"], a["row_weight"]
    target = torch.einsum("ts,trd->srd", pairs, m)
    loss = ((pairs.sum(0)[:, None] * logits.logsumexp(-1) - (a["z"] * target).sum(-1) / a["temperature"]) * rows).sum()
    torch.testing.assert_close(prototype_ce(**a), loss)
    own = logits.softmax(-1) @ a["prototypes"]
    dz = (pairs.sum(0)[:, None, None] * own - target) * rows[:, None] / a["temperature"]
    torch.testing.assert_close(with_gradients(a)[1], dz)


def test_a_shift_of_all_biases_changes_nothing():
    a = double(some_arguments())
    torch.testing.assert_close(with_gradients(a | {"bias": a["bias"] + 3}), with_gradients(a))


def test_an_equal_teacher_gives_no_gradient():
    """The loss is then the entropy, its minimum: no gradient for the rows, and none for the prototypes."""
    a = some_arguments(students=1, teachers=1, bias=None)
    a |= {"teacher_z": a["z"], "teacher_prototypes": a["prototypes"], "teacher_temperature": a["temperature"]}
    loss, dz, dprototypes = with_gradients(a)
    p = (a["z"] @ a["prototypes"].T / a["temperature"]).softmax(-1)
    entropy = -(p * p.log()).sum(-1)[0] @ a["row_weight"] * a["pair_weight"][0, 0]
    torch.testing.assert_close(loss, entropy)
    assert dz.abs().max() < 1e-6
    assert dprototypes.abs().max() < 1e-6


# --------------------------------------------------------------------------------- more than one chunk and piece


def test_chunks_of_the_reference_change_nothing(monkeypatch):
    a = double(some_arguments())
    whole = with_gradients(a)
    for rows_at_once in (1, 2, 4):
        monkeypatch.setattr(reference, "CHUNK_LOGITS", rows_at_once * 5 * 11)
        torch.testing.assert_close(with_gradients(a), whole)


@pytest.mark.parametrize("sizes", [(1, 1, 700, 40, 300), (3, 2, 130, 33, 200), (2, 1, 16, 300, 65)])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_chunks_of_positions_and_blocks_of_prototypes_on_the_cpu(sizes, threads):
    arguments = some_arguments(*sizes)
    torch.set_num_threads(threads)
    with running("cpu", "cpp"):
        result = outcome(SPEC, arguments)
    assert_as_exact_as_pytorch(SPEC, arguments, result, f"{sizes}, {threads} threads")


@every_runner
@pytest.mark.parametrize(("rows", "prototypes"), [(5, 300), (300, 20)])
def test_pieces_change_nothing(device, name, rows, prototypes, monkeypatch):
    """Cut along the prototypes or along the rows, whichever are more: three pieces where there was one."""
    arguments = some_arguments(2, 1, rows, 8, prototypes, device=device)
    with running(device, name):
        whole = with_gradients(arguments)
        monkeypatch.setattr(pieces, "PIECE", 2 * min(rows, prototypes) * 128)
        parts = with_gradients(arguments)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_pieces_are_even_and_whole_tiles():
    assert pieces.steps(1, 2048, 4096, pieces.PIECE) == (2048, 4096)
    assert pieces.steps(10, 64, 65536, pieces.PIECE // 10) == (64, 21888)
    rows, prototypes = pieces.steps(1, 43520, 4096, pieces.PIECE)
    assert prototypes == 4096
    assert rows % pieces.ALIGNED == 0
    assert rows * 4096 <= pieces.PIECE


@every_runner
def test_nothing_of_size_rows_by_prototypes_is_kept_for_the_backward(device, name):
    arguments = some_arguments(1, 1, 64, 4, 500, device=device)
    sizes = []
    with (
        running(device, name),
        torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x),
    ):
        prototype_ce(**arguments | {"z": arguments["z"].requires_grad_()})
    assert max(sizes) <= 500 * 4


# --------------------------------------------------------------------------------------------- the GPU's backward


@every_runner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_backward_that_computes_logits_again(device, name, dtype):
    """As on a GPU: the forward keeps two vectors of sums, and the backward starts from those."""
    arguments = some_arguments(dtype=dtype, device=device, products="fp32")
    leaves = [arguments[key].requires_grad_() for key in LEAVES]
    with running(device, name):
        args = SPEC.op.bind(**arguments)
        loss, _, _, *empty = torch.ops.patchlight.prototype_ce_fwd(*args[:-1], False)
        assert all(x.numel() == 0 for x in empty)
        later = torch.autograd.grad(3 * loss, leaves)
        at_once = torch.autograd.grad(3 * prototype_ce(**arguments), leaves)
    tolerance = 4 * torch.finfo(dtype).eps
    rounding = spread(lambda given: with_gradients(given)[1:], arguments)
    for a, b, moves in zip(later, at_once, rounding, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 3 * 4 * moves


@every_runner
def test_small_weights_survive_half_precision(device, name):
    """A million rows weigh 1e-6 each, and 65536 prototypes have 1.5e-5 of a row: each alone is near the smallest fp16."""
    arguments = some_arguments(1, 1, 3, 8, 70, torch.float16, device)
    small = torch.full_like(arguments["row_weight"], 1e-6)
    with running(device, name):
        loss, *gradients = with_gradients(arguments | {"row_weight": torch.ones_like(small)})
        args = SPEC.op.bind(**arguments | {"row_weight": small, "z": arguments["z"].requires_grad_()})
        outputs = torch.ops.patchlight.prototype_ce_fwd(*args)
    torch.testing.assert_close(outputs[0], loss * 1e-6)
    if device == "cpu":  # gradients made by the forward are fp32: the loss may still be scaled
        for made, scale, expected in zip(outputs[3:5], outputs[5], gradients, strict=True):
            assert (made * scale * 1e6 - expected.float()).abs().max() <= UNITS * expected.abs().max()


# ------------------------------------------------------------------------------------------------ fp32 rows in fp16

ROUNDED = ("fp16", "fp16x3")
# The largest error of any gradient in Frobenius norm, relative to fp64 (measured on unit vectors of 256 channels, K = 8192).
LIMITS = {"fp16": 1e-3, "fp16x3": 1e-5}
every_products = pytest.mark.parametrize("products", ROUNDED)
every_way = pytest.mark.parametrize("way", ["stream", "chunks"])


def unit_rows(peaked, rows=48, prototypes=1500, width=256):
    """Unit vectors as a head gives them; `peaked`: a student's row is close to a prototype."""
    draws = torch.Generator().manual_seed(SEED)
    random = lambda *shape: torch.randn(*shape, generator=draws)
    directions = normalize(random(prototypes, width), dim=-1)
    near = directions[:rows] + 0.02 * random(rows, width) if peaked else random(rows, width)
    views = lambda count: normalize(normalize(near, dim=-1) + 0.02 * random(count, rows, width), dim=-1)
    teacher = normalize(directions + 0.02 * random(prototypes, width), dim=-1)
    temperatures = {"temperature": 0.1, "teacher_temperature": 0.04}
    rows = {"z": views(1), "prototypes": directions, "teacher_z": views(1), "teacher_prototypes": teacher}
    return rows | temperatures | {"pair_weight": torch.ones(1, 1)}


def errors(result, expected):
    return [((x - y).norm() / y.norm()).item() for x, y in zip(result, expected, strict=True)]


@every_products
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize(("of_rows", "of_prototypes"), [(1, 1), (1e6, 1e-6), (1e-6, 1e-6), (1e6, 1e6)])
def test_errors_against_float64_do_not_depend_on_the_range(products, peaked, of_rows, of_prototypes):
    arguments, scale = unit_rows(peaked), of_rows * of_prototypes
    arguments = arguments | {
        "z": arguments["z"] * of_rows,
        "teacher_z": arguments["teacher_z"] * of_rows,
        "prototypes": arguments["prototypes"] * of_prototypes,
        "teacher_prototypes": arguments["teacher_prototypes"] * of_prototypes,
        "temperature": 0.1 * scale,
        "teacher_temperature": 0.04 * scale,
    }
    exact = with_gradients(double(arguments))
    with force("reference"):
        loss, *gradients = with_gradients(arguments | {"products": products})
        in_fp32 = with_gradients(arguments | {"products": "fp32"})
    assert loss.dtype == gradients[0].dtype == gradients[1].dtype == torch.float32
    of_loss, *of_gradients = errors((loss, *gradients), exact)
    assert of_loss <= 1e-4 if products == "fp16" else 1e-5
    assert max(of_gradients) <= LIMITS[products]
    if products == "fp16x3":
        assert max(of_gradients) <= 2 * max(errors(in_fp32, exact)[1:])


@every_runner
@every_products
@every_way
@pytest.mark.parametrize("sizes", [(3, 2, 9, 37, 200), (1, 1, 20, 16, 67), (10, 2, 3, 8, 70)])
def test_every_form_rounds_as_the_reference(device, name, products, way, sizes, monkeypatch):
    """Between two forms lies only the order of fp32 sums, and what it changes in the last place of a rounded gradient."""
    if name == "cpp":
        pytest.skip("it multiplies in fp32 only, and says so")
    monkeypatch.setattr(pieces, "WAY", way)
    arguments = some_arguments(*sizes, device=device) | {"products": products}
    with force("reference"):
        expected = with_gradients(arguments)
    with running(device, name):
        result = with_gradients(arguments)
    limit = 1e-4 if products == "fp16" else 1e-6  # of a gradient whose last place in fp16 differs
    moved = spread(with_gradients, {key: value for key, value in arguments.items() if key != "products"})
    for value, other, moves in zip(result, expected, moved, strict=True):
        assert (value - other).abs().max() <= limit * other.abs().max() + 8 * moves


@every_runner
@every_products
@pytest.mark.parametrize(("rows", "prototypes", "whole"), [(5, 200, True), (70, 20, True), (70, 20, False)])
def test_chunks_change_nothing(device, name, products, rows, prototypes, whole, monkeypatch):
    """Cut along the prototypes, where logits are computed twice, or along the rows: then once, if a block holds a whole row."""
    if name == "cpp":
        pytest.skip("it multiplies in fp32 only, and says so")
    monkeypatch.setattr(pieces, "WAY", "chunks")
    arguments = some_arguments(2, 1, rows, 8, prototypes, device=device) | {"products": products}
    with running(device, name):
        uncut = with_gradients(arguments)
        monkeypatch.setattr(pieces, "ALIGNED", 64)
        monkeypatch.setattr(pieces, "CHUNK", 16 * min(rows, prototypes) * 64)
        monkeypatch.setattr(pieces, "WHOLE_ROWS", pieces.WHOLE_ROWS if whole else 0)
        cut = pieces.steps(2, rows, prototypes, pieces.CHUNK // 16)
        assert cut != (rows, prototypes)
        parts = with_gradients(arguments)
        with torch.no_grad():
            alone = prototype_ce(**arguments)
    assert max(errors(parts, uncut)) <= (1e-4 if products == "fp16" else 1e-5)
    torch.testing.assert_close(alone, parts[0])


@every_runner
@every_products
@every_way
def test_a_prototype_without_probability_and_rows_of_every_length(device, name, products, way, monkeypatch):
    """Bias -inf, rows 1e-3 to 1e3 long, and rows of zeros: everything is finite and as exact as on unit rows."""
    if name == "cpp":
        pytest.skip("it multiplies in fp32 only, and says so")
    monkeypatch.setattr(pieces, "WAY", way)
    arguments = some_arguments(prototypes=130, device=device) | {"products": products}
    arguments["bias"][:70] = -torch.inf
    lengths = torch.logspace(-3, 3, 5, device=device)[:, None]
    arguments |= {"z": arguments["z"] * lengths, "teacher_z": arguments["teacher_z"] / lengths}
    arguments["z"][1, 2], arguments["teacher_z"][0, 3] = 0, 0
    exact = with_gradients(double(arguments))
    with running(device, name):
        result = with_gradients(arguments)
    assert all(x.isfinite().all() for x in result)
    with force("reference"):
        expected = errors(with_gradients(arguments), exact)
    for error, of_reference in zip(errors(result, exact), expected, strict=True):
        assert error <= 2 * of_reference + 1e-5


@every_runner
@every_way
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["z", "teacher_z", "prototypes", "teacher_prototypes"])
def test_what_is_not_finite_reaches_the_loss_in_fp16(device, name, way, value, which, monkeypatch):
    if name == "cpp":
        pytest.skip("it multiplies in fp32 only, and says so")
    monkeypatch.setattr(pieces, "WAY", way)
    arguments = some_arguments(prototypes=70, device=device) | {"products": "fp16"}
    arguments[which].view(-1)[-1] = value
    with running(device, name):
        assert prototype_ce(**arguments).isnan()


def test_powers_of_two():
    x = torch.tensor([0.0, 1e-45, 1.0, 1.999, 2.0, 3.4e38, torch.inf, torch.nan])
    expected = [2.0**-100, 2.0**-100, 1, 1, 2, 2.0**127, torch.inf, torch.inf]
    assert factors.power_of_two(x).tolist() == expected
    scale = factors.scales(3e5 * torch.ones(2), torch.zeros(1))
    assert 2.0**14 <= 3e5 / scale[0] < 2.0**15
    assert scale.isfinite().all()


def test_other_dtypes_are_multiplied_as_they_are():
    for dtype in (torch.float64, torch.bfloat16):
        arguments = some_arguments() if dtype == torch.float64 else some_arguments(dtype=dtype)
        arguments = double(arguments) if dtype == torch.float64 else arguments
        plain = with_gradients(arguments)
        for x, y in zip(with_gradients(arguments | {"products": "fp16"}), plain, strict=True):
            assert torch.equal(x, y)


def test_the_default_on_a_cpu_is_fp32():
    arguments = some_arguments()
    for x, y in zip(with_gradients(arguments), with_gradients(arguments | {"products": "fp32"}), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(prototype_ce(**arguments), prototype_ce(**arguments | {"products": None}))


@every_runner
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_temperature_on_the_device_is_the_number(device, name, dtype):
    arguments = some_arguments(device=device)
    number = torch.tensor(0.05, dtype=dtype, device=device)
    with running(device, name):
        expected = with_gradients(arguments | {"teacher_temperature": number.item()})
        result = with_gradients(arguments | {"teacher_temperature": number})
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)


@every_products
def test_a_compiler_joins_the_factors_with_what_makes_the_tensors(products):
    """The same loss and gradients, as both parts of a value survive the compiler's casts; no directions are written in fp32."""
    torch._dynamo.reset()
    arguments = some_arguments() | {
        "products": products,
        "teacher_temperature": torch.tensor(0.05, dtype=torch.float64),
    }
    v = arguments.pop("prototypes").requires_grad_()

    def loss(v, lengths):
        return prototype_ce(prototypes=v * (lengths / v.norm(dim=1, keepdim=True)), **arguments)

    def gradients(function):
        value = function(v, torch.ones(len(v), 1))
        return value.detach(), torch.autograd.grad(3 * value, v)[0]

    result, codes = run_and_get_code(gradients, torch.compile(loss, fullgraph=True))
    assert max(errors(result, gradients(loss))) <= (1e-4 if products == "fp16" else 1e-6)
    assert "empty_strided_cpu((11, 7), (7, 1), torch.float32)" not in codes[0]


def test_the_way_is_chosen_by_sizes():
    assert pieces.way(10, 64, 65536, "fp32") == "stream"
    assert pieces.way(10, 64, 65536, "fp16") == "chunks"
    assert pieces.way(3, 5, 11, "fp16") == "stream"
    assert pieces.way(3, 5, 11, "fp16x3") == "chunks"


# --------------------------------------------------------------------------------- weights, ranges, gradients


@every_runner
def test_pairs_and_rows_that_weigh_nothing(device, name):
    arguments = some_arguments(device=device)
    pair_weight = torch.zeros_like(arguments["pair_weight"])
    pair_weight[1, 2] = 0.5
    row_weight = arguments["row_weight"].clone()
    row_weight[3] = 0
    with running(device, name):
        given = arguments | {"pair_weight": pair_weight, "row_weight": row_weight}
        loss, dz, _ = with_gradients(given)
        only = arguments | {"pair_weight": pair_weight[1:, 2:], "row_weight": row_weight}
        alone = with_gradients(only | {"z": arguments["z"][2:], "teacher_z": arguments["teacher_z"][1:]})
    torch.testing.assert_close(loss, alone[0])
    assert (dz[2:] - alone[1]).abs().max() <= 4 * spread(with_gradients, given)[1]
    assert (dz[:2] == 0).all()
    assert (dz[2, 3] == 0).all()


def test_rows_weigh_the_same_by_default():
    arguments = some_arguments()
    equal = prototype_ce(**arguments | {"row_weight": torch.full((5,), 0.2)})
    assert torch.equal(prototype_ce(**arguments | {"row_weight": None}), equal)


@every_runner
def test_a_prototype_may_have_no_probability(device, name):
    """Bias -inf, even for whole tiles: no probability there, and everything stays finite."""
    arguments = some_arguments(2, 1, 3, 8, 150, device=device)
    arguments["bias"][:70] = -torch.inf
    with running(device, name):
        result = outcome(SPEC, arguments)
    assert all(value.isfinite().all() for value in result.values())
    assert_as_exact_as_pytorch(SPEC, arguments, result, name)


@every_runner
def test_extreme_logits_stay_finite(device, name):
    arguments = some_arguments(device=device)
    with running(device, name):
        result = outcome(SPEC, arguments | {"z": 1e4 * arguments["z"], "teacher_z": 1e4 * arguments["teacher_z"]})
    assert all(value.isfinite().all() for value in result.values())


@every_runner
@pytest.mark.parametrize("which", ["z", "teacher_z", "prototypes", "teacher_prototypes"])
def test_nan_reaches_the_loss(device, name, which):
    arguments = some_arguments(prototypes=70, device=device)
    arguments[which].view(-1)[-1] = torch.nan
    with running(device, name):
        assert prototype_ce(**arguments).isnan()


def test_nothing_flows_into_the_teacher_or_the_weights():
    arguments = some_arguments()
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    prototype_ce(**arguments).backward()
    reached = {key for key, value in arguments.items() if isinstance(value, torch.Tensor) and value.grad is not None}
    assert reached == set(LEAVES)


@pytest.mark.parametrize("leaf", LEAVES)
def test_one_gradient_can_be_wanted_alone(leaf):
    arguments = some_arguments()
    alone = torch.autograd.grad(prototype_ce(**arguments | {leaf: arguments[leaf].requires_grad_()}), arguments[leaf])
    torch.testing.assert_close(alone[0], with_gradients(some_arguments())[1 + LEAVES.index(leaf)])


def test_a_second_backward_gives_the_same():
    arguments = some_arguments()
    loss = prototype_ce(**arguments | {"z": arguments["z"].requires_grad_()})
    first = torch.autograd.grad(7 * loss, arguments["z"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(7 * loss, arguments["z"])[0])


# --------------------------------------------------------------------------------------------------- the rest

WRONG = {
    "z without views": ({"z": torch.zeros(5, 7)}, ValueError, r"\[student views, rows, width\], got shape \(5, 7\)"),
    "integers": ({"z": torch.zeros(3, 5, 7, dtype=torch.long)}, TypeError, "got torch.int64; cast it"),
    "teacher's rows": ({"teacher_z": torch.zeros(2, 6, 7)}, ValueError, r"\[teacher views, 5, 7\] like z, got shape \(2, 6, 7\)"),
    "prototypes' width": ({"prototypes": torch.zeros(11, 8)}, ValueError, r"\[count, 7\] .*, got shape \(11, 8\)"),
    "no prototypes": ({"prototypes": torch.zeros(0, 7)}, ValueError, "a count of at least 1"),
    "teacher's prototypes": ({"teacher_prototypes": torch.zeros(12, 7)}, ValueError, r"\(11, 7\), got \(12, 7\)"),
    "mixed dtypes": ({"prototypes": torch.zeros(11, 7).half()}, TypeError, "prototypes must be torch.float32 like z"),
    "pairs transposed": ({"pair_weight": torch.zeros(3, 2)}, ValueError, r"pair_weight must be \(2, 3\), got \(3, 2\)"),
    "row weights": ({"row_weight": torch.zeros(6)}, ValueError, r"row_weight must be \(5,\), got \(6,\)"),
    "bias": ({"bias": torch.zeros(7)}, ValueError, r"bias must be \(11,\), got \(7,\)"),
    "half weights": ({"row_weight": torch.zeros(5).half()}, TypeError, "row_weight must be torch.float32 beside a z"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    "temperature nan": ({"teacher_temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
    "teacher's temperatures": ({"teacher_temperature": torch.ones(2)}, ValueError, r"float32 of shape \(2,\) on cpu"),
    "products": ({"products": "tf32"}, ValueError, r"products must be one of .*, got 'tf32'"),
    "temperature tensor": ({"temperature": torch.tensor(0.1)}, TypeError, "must be a Python float, got a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_rule_got_and_remedy(wrong):
    change, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words) as caught:
        prototype_ce(**some_arguments() | change)
    assert str(caught.value).startswith("prototype_ce: ")
    assert ";" in str(caught.value), "no remedy"


@pytest.mark.parametrize("sizes", [(0, 1, 3, 8, 5), (2, 0, 3, 8, 5), (2, 1, 0, 8, 5)])
def test_no_rows_or_views_cost_nothing(sizes):
    loss, *gradients = with_gradients(some_arguments(*sizes))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_no_channels_make_all_prototypes_equal():
    arguments = some_arguments(1, 1, 2, 0, 5, bias=None, row_weight=None, pair_weight=torch.ones(1, 1))
    torch.testing.assert_close(prototype_ce(**arguments), torch.tensor(5.0).log())


PANELS = """
#include <cstdio>
#include <vector>
#include "product.h"
using namespace patchlight;
template <class F> int check(F product, bool adjacent_rows, int rows, int inner, int outer, bool accumulate) {
  std::vector<float> a(rows * inner * outer), b(inner * outer * kPanel), c(rows * kPanel, 0.5f);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(int(i * 7 % 11) - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = float(int(i * 5 % 13) - 6);
  PanelProduct p{a.data(), adjacent_rows ? 1 : inner * outer, adjacent_rows ? rows : 1, adjacent_rows ? rows * inner : inner,
                 b.data(), kPanel, inner * kPanel, c.data(), kPanel, rows, inner, outer, accumulate};
  product(p);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kPanel; ++j) {
      float sum = accumulate ? 0.5f : 0.0f;
      for (int k = 0; k < inner * outer; ++k) sum += a[adjacent_rows ? k * rows + i : i * inner * outer + k] * b[k * kPanel + j];
      if (sum != c[i * kPanel + j]) return 1;
    }
  return 0;
}
template <class F> int check_all(F product) {
  int wrong = 0;
  for (bool adjacent : {false, true})
    for (bool accumulate : {false, true})
      wrong += check(product, adjacent, 1, 3, 1, accumulate) + check(product, adjacent, 8, 5, 2, accumulate) +
               check(product, adjacent, 19, 32, 3, accumulate) + check(product, adjacent, 4, 0, 1, accumulate);
  return wrong;
}
int main() {
  int wrong = check_all(product_plain);
  if (__builtin_cpu_supports("x86-64-v3")) wrong += check_all(product_avx2);
  if (__builtin_cpu_supports("x86-64-v4")) wrong += check_all(product_avx512);
  float worst = 0;
  for (float x = 0; x > -126; x -= 0.0371f) worst = std::max(worst, std::abs(exp2_inline(x) / std::exp2(x) - 1));
  const float nothing = exp2_inline(-INFINITY) + exp2_inline(-127.0f), nan = exp2_inline(NAN);
  return wrong || worst > 2.4e-7f || nothing != 0 || nan == nan || exp2_inline(0) != 1;
}
"""


def test_panel_products_of_every_instruction_set(tmp_path):
    """The library runs the widest set of a machine; here all of the machine's sets give the same sums of small integers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler or os.uname().machine != "x86_64":
        pytest.skip("no g++ on x86-64")
    from torch.utils.cpp_extension import include_paths

    source, program = tmp_path / "panels.cpp", tmp_path / "panels"
    source.write_text("#include <algorithm>\n#include <cmath>\n" + PANELS)
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    flags = ["-std=c++20", "-O2", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    build = subprocess.run([compiler, *flags, *includes, source, "-o", program], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert subprocess.run([program]).returncode == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in ("triton", "cuda")])
def test_offsets_beyond_32_bits(name):
    row = normalize(torch.randn(256), dim=0).to("cuda", torch.bfloat16)
    z = row.expand(1, 8_500_000, -1).contiguous()  # 2.2e9 values
    prototypes = normalize(torch.randn(64, 256), dim=-1).to("cuda", torch.bfloat16)
    pairs = torch.ones(1, 1, device="cuda")
    with running("cuda", name):
        loss, dz, _ = with_gradients(
            dict(zip(("z", "prototypes", "teacher_z", "teacher_prototypes"), (z, prototypes) * 2, strict=True))
            | {"temperature": 0.1, "teacher_temperature": 0.04, "pair_weight": pairs}
        )
    with force("reference"):
        expected = prototype_ce(z[:, :1], prototypes, z[:, :1], prototypes, 0.1, 0.04, pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert torch.equal(dz[0, 0], dz[0, -1])
