"""Which implementation runs: the forced one or none, and `explain` gives the reason for every other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from parity import ROOT

from patchlight_kernels import explain, force, neighbor_topk
from patchlight_kernels.dispatch import Impl, Op

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
