"""Which implementation runs: the forced one or none, else the fastest where somebody measured; `explain` gives the reasons."""

from __future__ import annotations

import contextlib
import csv
import datetime
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from parity import HAS_GPU, ROOT, assert_as_exact_as_pytorch, running
from torch._subclasses.fake_tensor import FakeTensorMode

from patchlight_kernels import explain, force, hardware, measured, neighbor_topk, query_attention, registry
from patchlight_kernels.dispatch import IMPLEMENTATIONS, Impl, Op, ops
from patchlight_kernels.measured import Place, Win
from patchlight_kernels.ops.query_attention import torch_attention

X = torch.randn(1, 9, 4)


def run_with(setting: str) -> subprocess.CompletedProcess:
    code = "import torch, patchlight_kernels as pk; print(pk.explain('neighbor_topk', torch.randn(1, 9, 4), (3, 3), 2))"
    environment = {**os.environ, "PATCHLIGHT_IMPL": setting, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_explain_names_the_implementation_that_runs_and_why_others_do_not():
    text = explain("neighbor_topk", X, (3, 3), 2)
    assert text.splitlines()[0].endswith("runs")
    assert "cuda       the tensors are on cpu, not on a GPU" in text
    assert len(text.splitlines()) == 5


def test_a_forced_implementation_runs_or_fails():
    with (
        force(neighbor_topk="cuda"),
        pytest.raises(RuntimeError, match="'cuda' is forced but cannot run: the tensors are on cpu"),
    ):
        neighbor_topk(X, (3, 3), 2)
    neighbor_topk(X, (3, 3), 2)


def test_a_force_for_an_op_goes_before_one_for_all_and_both_end():
    with force("cuda", neighbor_topk="reference"):
        assert "reference runs (forced)" in explain("neighbor_topk", X, (3, 3), 2)
    assert "forced" not in explain("neighbor_topk", X, (3, 3), 2)


def test_force_inside_compile_is_obeyed_at_run_time():
    compiled = torch.compile(lambda x: neighbor_topk(x, (3, 3), 2), backend="aot_eager", fullgraph=True)
    compiled(X)
    with force("cuda"), pytest.raises(RuntimeError, match="forced but cannot run"):
        compiled(X)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"neighbor_topp": "cpp"}, "an op must be one of .*, got 'neighbor_topp'"),
        ({"neighbor_topk": "fast"}, "implementation of neighbor_topk must be one of .*, got 'fast'"),
    ],
)
def test_force_refuses_unknown_names(names, message):
    with pytest.raises(ValueError, match=message), force(**names):
        pass


def test_the_environment_forces_and_wrong_settings_are_errors():
    assert "reference runs (forced)" in run_with("*=cpp, neighbor_topk=reference").stdout
    assert "nothing runs: neighbor_topk: 'cuda' is forced but cannot run" in run_with("*=cuda").stdout
    assert "each setting must be op=implementation, got 'triton'" in run_with("triton").stderr
    assert "got 'prototype'; choose one of them" in run_with("prototype=cpp").stderr


def test_an_op_must_end_in_its_reference():
    with pytest.raises(ValueError, match=r"must come from .* and end in 'reference'"):
        Op("nothing", bind=lambda: (), impls=(Impl("cpp", lambda: None, lambda: None),))


def test_doctor_prints_versions_libraries_and_ops():
    result = subprocess.run(
        [sys.executable, "-m", "patchlight_kernels", "doctor"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for name in ("torch", "triton", "C++ library", "CUDA library", "neighbor_topk", "reference"):
        assert name in result.stdout


ROWS = [(place, win) for place, wins in measured.read().items() for win in wins]
row_of_the_table = pytest.mark.parametrize(
    ("place", "win"), ROWS, ids=lambda x: getattr(x, "case", getattr(x, "op", ""))
)


@row_of_the_table
def test_a_row_of_the_table_names_what_exists(place, win):
    op = ops()[place.op]
    assert place.direction in measured.DIRECTIONS and (place.direction == "forward" or len(op.directions) == 2)
    names = {impl.name for impl in op.impls}
    assert {win.winner, win.runner_up} <= names & set(IMPLEMENTATIONS) and win.winner != win.runner_up
    assert place.architecture in ("sm_80", "sm_90", "sm_100")
    assert win.us < win.runner_up_us
    assert datetime.date.fromisoformat(win.date)
    others = {other.winner for at, other in ROWS if at == place}
    assert others == {win.winner}, f"{place}: cases differ, so the size class must be divided"


@row_of_the_table
def test_a_row_of_the_table_is_in_its_file(place, win):
    with (ROOT / win.file).open() as file:
        rows = list(csv.DictReader(file))
    mode = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}[place.direction]
    dtype = str(place.dtype).removeprefix("torch.")
    for name, us in ((win.winner, win.us), (win.runner_up, win.runner_up_us)):
        wanted = (place.op, win.case, dtype, mode, f"patchlight {name}", "ok", win.hardware, win.date)
        columns = ("op", "case", "dtype", "mode", "provider", "status", "hardware", "date")
        (row,) = [row for row in rows if tuple(row[column] for column in columns) == wanted]
        assert float(row["median_ms"]) * 1e3 == pytest.approx(us, rel=1e-6)


@row_of_the_table
def test_a_row_of_the_table_has_the_size_class_of_its_case(place, win):
    spec = registry.spec(place.op)
    (case,) = [case for case in spec.benches if case.name == win.case]
    with FakeTensorMode():
        assert spec.op.size(*spec.bind(spec.inputs(case, place.dtype, "cpu"))) == place.size


@contextlib.contextmanager
def as_on(architecture: str, triton: str | None = None):
    """Within the block forms are chosen as on a GPU that has everything, or, for a reason, not Triton."""
    with (
        mock.patch.object(hardware, "no_cuda_library", lambda *_: None),
        mock.patch.object(hardware, "no_cpu_library", lambda *_: "the tensors are on a GPU"),
        mock.patch.object(hardware, "no_triton", lambda *_: triton),
        mock.patch.object(hardware, "architecture", lambda *_: architecture),
    ):
        yield


def test_the_form_that_was_faster_runs_where_it_was():
    x = X.bfloat16()
    with as_on("sm_90"):
        text = explain("neighbor_topk", x, (3, 3), 2, None)
        assert text.startswith("neighbor_topk: triton runs: 263 us against cuda's 523 (NVIDIA H200, 2026-11-28, B512")
        assert "cuda       could run\n" in text and "triton     runs\n" in text
        assert explain("neighbor_topk", x, (3, 3), 2).startswith(
            "neighbor_topk: cuda runs: 66.3 us against triton's 179"
        )


@pytest.mark.parametrize(
    ("architecture", "x", "radius"),
    [("sm_80", X.bfloat16(), None), ("sm_90", X, None), ("sm_90", torch.randn(1, 25, 4).bfloat16(), 2)],
    ids=["architecture", "dtype", "size"],
)
def test_where_nobody_measured_the_order_is_a_prediction(architecture, x, radius):
    side = 3 if x.shape[1] == 9 else 5
    with as_on(architecture):
        text = explain("neighbor_topk", x, (side, side), 2, radius)
    assert text.startswith(f"neighbor_topk: cuda runs: order by prediction: not measured on {architecture} (")


def test_both_directions_are_chosen_by_what_was_measured_of_them():
    qkv = torch.randn(1, 70, 3, 1, 8).bfloat16()
    op = ops()["query_attention"]
    args = op.bind(qkv, 66)
    with as_on("sm_90"):
        assert [op.choose(*args, direction=d).name for d in op.directions] == ["triton", "cuda"]
        first, second, *lines = explain("query_attention", qkv, 66).splitlines()
    assert first.startswith("query_attention: triton runs: 165 us against cuda's 210")
    assert second.startswith("query_attention backward: cuda runs: order by prediction: not measured on sm_90")
    states = dict(line.split(maxsplit=1) for line in lines)
    assert (states["cuda"], states["triton"]) == ("runs backward", "runs forward")


def test_a_form_that_was_not_in_the_race_keeps_its_predicted_place():
    qkv = torch.randn(1, 70, 3, 1, 8).bfloat16()
    op = ops()["query_attention"]
    args = op.bind(qkv, 66)
    with as_on("sm_90"):
        assert [impl.name for impl in op.order("forward", args)] == ["cpp", "torch", "triton", "cuda", "reference"]
        with mock.patch.object(torch_attention, "no_flash_attention", lambda qkv: None):
            assert [op.choose(*args, direction=d).name for d in op.directions] == ["torch", "torch"]
            text = explain("query_attention", qkv, 66)
    assert text.startswith(
        "query_attention: torch runs: order by prediction: not yet measured beside triton's 165 us against"
    )


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("backward", ["cuda", "triton"]), ("forward", ["triton", "cuda"]), ("both", ["triton"] * 2)],
)
def test_a_row_holds_for_its_direction(direction, expected):
    architecture = f"sm_of_a_test_{direction}"  # what was chosen for a place is remembered
    op = ops()["class_attention"]
    args = op.bind(*[torch.randn(1, 2, 1, 4)] * 5)
    place = Place("class_attention", direction, "all patches", torch.float32, architecture)
    win = Win("triton", 1.0, "cuda", 2.0, "a case", "a GPU", "2026-01-01", "a file")
    with as_on(architecture), mock.patch.object(measured, "read", lambda: {place: (win,)}):
        assert [op.choose(*args, direction=d).name for d in op.directions] == expected


def test_what_is_forced_or_cannot_run_goes_before_what_was_measured():
    x = X.bfloat16()
    with as_on("sm_90"), force(neighbor_topk="cuda"):
        assert explain("neighbor_topk", x, (3, 3), 2, None).startswith("neighbor_topk: cuda runs (forced)")
    with as_on("sm_90", triton="Triton is not installed"):
        text = explain("neighbor_topk", x, (3, 3), 2, None)
    assert text.startswith("neighbor_topk: cuda runs: triton, measured as faster, cannot run\n")
    assert "triton     Triton is not installed" in text


def test_the_table_is_not_read_on_a_cpu():
    with mock.patch.object(measured, "read", side_effect=AssertionError("the table was read")):
        neighbor_topk(X, (3, 3), 2)
        qkv = torch.randn(1, 5, 3, 1, 8, requires_grad=True)
        query_attention(qkv, 3).sum().backward()


@pytest.mark.parametrize(("forward", "backward"), [("triton", "cuda"), ("cuda", "triton")])
@pytest.mark.parametrize("name", [spec.name for spec in registry.specs() if spec.differentiable])
def test_a_backward_takes_what_another_form_saved(name, forward, backward):
    spec = registry.spec(name)
    device = "cuda" if HAS_GPU else "cpu"
    arguments = spec.inputs(spec.tests[0], torch.float32, device)
    leaves = {key: arguments[key].detach().requires_grad_() for key in spec.differentiable}
    args = list(spec.bind({**arguments, **leaves}))
    if args[-1] is True:  # whether a forward on a CPU makes the gradients: on a GPU it does not
        args[-1] = False
    with running(device, forward):
        out = getattr(torch.ops.patchlight, f"{name}_fwd")(*args)[0]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    with running(device, backward):
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    named = {f"gradient of {key}": gradient.double() for key, gradient in zip(leaves, gradients, strict=True)}
    result = spec.observe(arguments, out.detach()) | named
    assert_as_exact_as_pytorch(spec, arguments, result, f"{name} {forward} then {backward}")
