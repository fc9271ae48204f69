"""What holds for every implementation of every op: exactness, repeatability, no unwritten output, one graph node."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from parity import (
    RUNNERS,
    SEED,
    TORCH_RUNNERS,
    assert_as_exact_as_pytorch,
    outcome,
    reason_against,
    running,
    tensors,
    widened,
)

from patchlight_kernels import extension, force, registry

SPECS = registry.specs()
DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
WITH_16_BIT_RESULTS = ("adamw", "class_attention", "photometric", "prototype_ce", "query_attention", "self_relation")
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def runners_of(spec) -> list:
    """Each implementation of an op on each device, as a parameter of pytest."""
    has_torch = any(impl.name == "torch" for impl in spec.op.impls)
    rows = RUNNERS + (TORCH_RUNNERS if has_torch else [])
    return [row if hasattr(row, "marks") else pytest.param(*row) for row in rows]


def each_implementation(specs):
    """Runs a test for each implementation of these ops."""
    rows = [(spec, runner) for spec in specs for runner in runners_of(spec)]
    given = [
        pytest.param(spec, *r.values, marks=r.marks, id="-".join((spec.name, *map(str, r.values)))) for spec, r in rows
    ]
    return pytest.mark.parametrize(("spec", "device", "name"), given)


EVERY_CASE = [
    pytest.param(spec, case, *r.values, marks=r.marks, id="-".join((spec.name, str(case), *map(str, r.values))))
    for spec in SPECS
    for case in spec.tests
    for r in runners_of(spec)
]


def compute(spec, device, name, arguments):
    """Output and gradients, or None after checking that an implementation that does not take the arguments raises."""
    with running(device, name):
        if reason := reason_against(spec, name, arguments):
            with pytest.raises(RuntimeError, match="is forced but cannot run"):
                spec.public(**arguments)
            assert len(reason) > 10, "a reason must be a sentence"
            return None
        return outcome(spec, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "case", "device", "name"), EVERY_CASE)
def test_is_as_exact_as_pytorch(spec, case, dtype, device, name):
    arguments = spec.inputs(case, dtype, device, SEED)
    result = compute(spec, device, name, arguments)
    if result is not None:
        assert_as_exact_as_pytorch(spec, arguments, result, f"{name} on {device}")


@each_implementation(SPECS)
def test_repeats_bit_for_bit_and_writes_everything(spec, device, name):
    """Two runs agree bit for bit, although all fresh memory holds NaN (or the largest integer) in both."""
    arguments = spec.inputs(spec.tests[1], torch.float32, device, SEED)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        first, second = (compute(spec, device, name, arguments) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert torch.isfinite(value).all(), key


@each_implementation(SPECS)
@pytest.mark.parametrize("layout", ["behind a class token", "transposed", "offset by one value", "needing a gradient"])
def test_takes_any_layout(spec, layout, device, name):
    arguments = spec.inputs(spec.tests[1], torch.bfloat16, device, SEED)
    changed = dict(arguments)
    for key, value in arguments.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        if layout == "behind a class token":
            changed[key] = torch.cat([torch.full_like(value[:, :1], torch.nan), value], dim=1)[:, 1:]
        elif layout == "transposed":
            changed[key] = value.transpose(-2, -1).contiguous().transpose(-2, -1)
        elif layout == "offset by one value":
            changed[key] = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
        else:
            changed[key] = value.clone().requires_grad_()
        assert torch.equal(changed[key], value)
    result = compute(spec, device, name, changed)
    assert_as_exact_as_pytorch(spec, arguments, result, f"{layout}, {name} on {device}")


LARGE = {
    "adamw": {"parameter": 1e5, "teacher": 1e5},
    "class_attention": {"v_self": 50.0, "v_patches": 50.0},
    "query_attention": {"qkv": 3.0},
}


def overflowing(spec) -> tuple[dict, float]:
    """Arguments in fp16 and a factor of the upstream gradients, so that some fp16 results exceed 65504."""
    arguments = spec.inputs(spec.tests[0 if spec.name == "adamw" else 1], torch.float16, "cpu", SEED)
    for key, factor in LARGE.get(spec.name, {}).items():
        x = arguments[key]
        arguments[key] = (torch.where(x.abs() < 1, x.sign(), x) if spec.name == "adamw" else x) * factor
    if spec.name == "photometric":
        arguments["std"] = (1e-6, 1e-6, 1e-6)
    return arguments, 1e9 if spec.name in ("prototype_ce", "self_relation") else 1e4


@each_implementation([spec for spec in SPECS if spec.name in WITH_16_BIT_RESULTS])
def test_what_overflows_fp16_is_infinite(spec, device, name):
    """As the scale of the loss needs it, or NaN. Results may be on either side of the limit by 2 % of the largest one."""
    arguments, upstream = overflowing(spec)
    arguments = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    with running(device, name):
        result = outcome(spec, arguments, upstream)
    with force("reference"):
        exact = outcome(spec, widened(arguments), upstream)
    found = 0
    for key, value in result.items():
        if key in ("parameter", "teacher", "exp_avg", "exp_avg_sq", "steps", "loss"):
            continue  # fp32
        margin = 0.02 * exact[key].abs().clamp(max=1e6).max()
        large = exact[key].abs() > 65504 + margin
        assert not value[large].isfinite().any(), key
        # Some forms take the gradients of the scores in fp16, where they may overflow earlier than what follows from them.
        if (spec.name, name) not in (("query_attention", "cuda"), ("query_attention", "torch")):
            assert value[exact[key].abs() < 65504 - margin].isfinite().all(), key
        found += large.sum().item()
    assert found, "nothing overflowed"


@each_implementation(SPECS)
@pytest.mark.parametrize("factor", [1e10, 1e18, 3e38, 1e-30, 1e-42])
def test_is_finite_where_pytorch_is(spec, factor, device, name):
    """On large and tiny features, where float64 has results that fit into fp32."""
    if spec.name in ("adamw", "block_masks", "photometric"):
        pytest.skip("takes no features")
    arguments = spec.inputs(spec.tests[1], torch.float32, device, SEED)
    for key, value in arguments.items():
        is_weight = key in ("pair_weight", "row_weight", "weight", "bias")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not is_weight:
            arguments[key] = value * factor
    result = compute(spec, device, name, arguments)
    with force("reference"):
        eager, exact = outcome(spec, arguments), outcome(spec, widened(arguments))
    for key, value in result.items():
        fits = eager[key].isfinite() & (exact[key].abs() < torch.finfo(torch.float32).max)
        assert value[fits].isfinite().all(), key


@each_implementation(SPECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_is_not_lost(spec, bad, device, name):
    """One bad value in any features reaches a result, if it does in the reference; rows that nobody reads need not."""
    if spec.name in ("adamw", "block_masks", "photometric", "neighbor_topk"):
        pytest.skip("takes no features, or ranks NaN last")
    arguments = spec.inputs(spec.tests[1], torch.float32, device, SEED)
    for key in [key for key, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point() and x.dim()]:
        changed = arguments | {key: arguments[key].clone()}
        changed[key].flatten()[0] = bad
        with force("reference"):
            expected = outcome(spec, changed)
        result = compute(spec, device, name, changed)
        if not all(x.isfinite().all() for x in expected.values()):
            assert not all(x.isfinite().all() for x in result.values()), key


@every_spec
def test_cuda_on_a_cpu_runs_the_cuda_kernels(spec):
    arguments = spec.inputs(spec.tests[1], torch.float32, "cpu", SEED)
    with running("cpu", "cuda"), mock.patch.object(extension, "native", side_effect=extension.native) as native:
        outcome(spec, arguments)
    assert native.called


@every_spec
def test_is_one_node_of_a_full_graph(spec):
    torch._dynamo.reset()  # the graphs of all ops would count as recompilations of the one lambda below
    arguments = spec.inputs(spec.tests[1], torch.float32, "cpu", SEED)
    nodes = []

    def backend(graph, _):
        nodes.extend(n for n in graph.graph.nodes if n.op == "call_function" and "patchlight" in str(n.target))
        return graph.forward

    compiled = torch.compile(lambda **kw: spec.public(**kw), fullgraph=True, backend=backend)
    for result, eager in zip(tensors(compiled(**arguments)), tensors(spec.public(**arguments)), strict=True):
        assert torch.equal(result, eager)
    assert len(nodes) == 1


@every_spec
def test_compiles_with_inductor_and_changing_sizes(spec):
    """Forward and, where there is one, backward."""
    torch._dynamo.reset()  # the graphs of all ops would count as recompilations of the one lambda below
    compiled = replace(spec, public=torch.compile(lambda **kw: spec.public(**kw), fullgraph=True, dynamic=True))
    for case in spec.tests[1:3]:
        arguments = spec.inputs(case, torch.float32, "cpu", SEED)
        eager = outcome(spec, arguments)
        for key, value in outcome(compiled, arguments).items():
            assert torch.equal(value, eager[key]), key


@every_spec
def test_opcheck(spec):
    arguments = spec.inputs(spec.tests[1], torch.float32, "cpu", SEED)
    op = getattr(torch.ops.patchlight, f"{spec.name}_fwd").default
    for key in spec.differentiable:
        arguments[key].requires_grad_()
    torch.library.opcheck(op, spec.bind(arguments))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.differentiable], ids=lambda spec: spec.name)
def test_reference_gradient_is_the_derivative(spec):
    """Finite differences in float64 on the smallest case."""
    arguments = widened(spec.inputs(spec.tests[0], torch.float32, "cpu", SEED))
    leaves = [arguments[key].requires_grad_() for key in spec.differentiable]

    def function(*values):
        output = tensors(spec.public(**{**arguments, **dict(zip(spec.differentiable, values, strict=True))}))
        return tuple(part for part in output if part.requires_grad)

    with force("reference"):
        torch.autograd.gradcheck(function, leaves)


@every_spec
def test_autocast_leaves_the_input_dtype_alone(spec):
    arguments = spec.inputs(spec.tests[1], torch.float32, "cpu", SEED)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spec.public(**arguments)
    for a, b in zip(tensors(inside), tensors(spec.public(**arguments)), strict=True):
        assert torch.equal(a, b)


@every_spec
def test_costs_are_counted(spec):
    for case in spec.benches:
        assert spec.min_bytes(case, torch.bfloat16) > 0
        assert spec.flops(case) > 0
    assert any(case.small for case in spec.benches), "no case that a laptop finishes"
