"""The op suite as pytest-benchmark: `pytest bench --benchmark-only`. The CSV of `python -m bench ops` is the record."""

from __future__ import annotations

import functools

import pytest
import torch

from bench.ops import TOLERANCE, find_providers, largest_error
from patchlight_kernels import registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
JOBS = [
    pytest.param(spec, case, name, id=f"{spec.name}-{case}-{name}")
    for spec in registry.specs()
    for case in spec.benches
    if case.small
    for name in find_providers(spec, spec.inputs(case, DTYPE, DEVICE))
]


@pytest.mark.parametrize(("spec", "case", "name"), JOBS)
def test_speed(benchmark, spec, case, name):
    arguments = spec.inputs(case, DTYPE, DEVICE)
    call = functools.partial(find_providers(spec, arguments)[name], **arguments)
    try:
        output = call()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert largest_error(spec, arguments, output) <= TOLERANCE
    benchmark.group = f"{spec.name} {case}"

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
