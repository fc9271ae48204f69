"""How kernels are launched: on the GPU that has the tensors, within the limits of a grid, with fixed settings if asked."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from triton.runtime import Autotuner
from triton.runtime.interpreter import InterpretedFunction

from patchlight_kernels import hardware, registry, tuning
from patchlight_kernels.arguments import with_near_rows
from patchlight_kernels.dispatch import triton_call
from patchlight_kernels.ops.prototype_ce import triton_kernels as prototype_ce
from patchlight_kernels.ops.query_attention import triton_kernels as query_attention
from patchlight_kernels.ops.self_relation import triton_kernels as self_relation


@contextlib.contextmanager
def recorded_grids():
    """Within the block kernels do not run; the list gets their grids, with the first of their configurations."""
    grids = []

    def record(kernel, *args, grid, warmup, **kwargs):
        config = kernel.configs[0].kwargs if isinstance(kernel, Autotuner) else {}
        grids.append(grid(kwargs | config) if callable(grid) else grid)

    with mock.patch.object(Autotuner, "run", record), mock.patch.object(InterpretedFunction, "run", record):
        yield grids


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_self_relation() -> None:
    """ViT-B's local pairs at 512 images."""
    student, teacher = empty(16, 512, 12, 36, 64), empty(512, 12, 36, 64)
    weight = empty(16, 512, dtype=torch.float32)
    loss, *sums = self_relation.self_relation_fwd(student, teacher, 1.0, 1.0, weight, False)
    self_relation.self_relation_bwd(torch.bfloat16, loss, *sums, student, teacher, 1.0, 1.0, weight, False)


def launch_query_attention() -> None:
    qkv = empty(6000, 197, 3, 12, 64)
    out, lse = query_attention.query_attention_fwd(qkv, 150, 0)
    query_attention.query_attention_bwd(out, qkv, out, lse, 150, 0)


def launch_prototype_ce() -> None:
    """Three million rows."""
    tiles = [empty(2, *views, 3 << 20, dtype=torch.float32) for views in ((1,), (1,), (1, 1))]
    prototype_ce.merge(*tiles, empty(1, 1, dtype=torch.float32), empty(3 << 20, dtype=torch.float32))


@pytest.mark.parametrize("launch", [launch_self_relation, launch_query_attention, launch_prototype_ce])
def test_large_batches_stay_within_the_limits_of_a_grid(launch):
    with recorded_grids() as grids:
        launch()
    assert grids
    for grid in grids:
        assert hardware.grid_too_large(*grid) is None, grid


def test_grids_beyond_a_limit_are_named():
    assert hardware.grid_too_large(2**31 - 1, 65535, 65535) is None
    assert (
        hardware.grid_too_large(2**31)
        == "one launch would need 2147483648 blocks along x and may have 2147483647; split the batch"
    )
    assert "65536 blocks along y" in hardware.grid_too_large(1, 65536)
    assert "65536 blocks along z" in hardware.grid_too_large(1, 1, 65536)


@pytest.mark.parametrize(
    "name", ["class_attention", "self_relation", "query_attention", "neighbor_topk", "photometric"]
)
def test_batches_beyond_a_grid_are_a_reason(name):
    """Stand-ins of that size that take no memory, and a GPU that could run everything else."""
    op = registry.spec(name).op
    if name == "class_attention":
        own, patches = empty(1 << 28, 1, 8, 2), empty(1 << 28, 2, 8, 2)
        args = own, own, own, patches, patches, None
    elif name == "self_relation":
        args = empty(1 << 14, 1 << 15, 4, 64, 1), empty(1 << 15, 4, 64, 1), 1.0, 1.0, None, False
    elif name == "query_attention":
        args = empty(1 << 28, 8, 3, 8, 1), 8, 0
    elif name == "neighbor_topk":
        args = empty(1 << 31, 2, 1), 1, 2, 1, 1, False, False
    else:
        pixels = torch.empty(1 << 30, 8, 8, 3, dtype=torch.uint8, device="meta")
        args = pixels, empty(1 << 30, 8, dtype=torch.float32), [0.0] * 3, [1.0] * 3, torch.float32
    impl = next(impl for impl in op.impls if impl.name == "triton")
    with mock.patch.object(hardware, "no_triton", lambda tensor: None):
        assert "one launch would need" in impl.unsupported(*args)


def test_rows_too_far_apart_for_32_bits_are_copied():
    near, far = empty(1, 9, 8), torch.empty_strided((1, 9, 8), (0, 1 << 28, 1), device="meta")
    assert with_near_rows(near) is near
    assert with_near_rows(far).is_contiguous()


def test_prototype_rows_too_far_apart_for_32_bits_are_a_reason():
    near, far = empty(1, 9, 8), torch.empty_strided((1, 9, 8), (0, 1 << 24, 1), device="meta", dtype=torch.bfloat16)
    op = registry.spec("prototype_ce").op
    impl = next(impl for impl in op.impls if impl.name == "triton")
    with mock.patch.object(hardware, "no_triton", lambda tensor: None):
        assert impl.unsupported(near, near[0], near, near[0]) is None
        assert "overflow its 32-bit offsets" in impl.unsupported(far, near[0], near, near[0])


@pytest.fixture
def current(monkeypatch):
    """A stand-in for torch.cuda.device; the list has the devices that are current, the last one counts."""
    devices = ["cuda:0"]

    @contextlib.contextmanager
    def device(which):
        devices.append(str(which))
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


@pytest.fixture
def call(monkeypatch, current):
    """A Triton wrapper that says which device is current."""
    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "stand_in.triton_kernels", SimpleNamespace(launch=lambda *args: current[-1]))
    return triton_call("stand_in", "launch")


def on(device: str) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device))


def test_triton_launches_on_the_gpu_that_has_the_tensors(call, current):
    assert call(on("cuda:1"), 3) == "cuda:1"
    assert call(torch.bfloat16, None, on("cuda:2")) == "cuda:2", "the first argument that has a device"
    assert call([], [None, on("cuda:3")], on("cuda:3")) == "cuda:3", "lists of tensors"
    assert current == ["cuda:0"]


def test_on_a_cpu_no_device_is_made_current(call):
    assert call(torch.zeros(2), 3) == "cuda:0"


def test_deterministic_runs_do_not_choose_by_time(monkeypatch):
    """The first configuration, also after the fastest one was found."""
    configs = [triton.Config({"BLOCK": size}) for size in (16, 32, 64)]
    monkeypatch.setattr(hardware, "triton_interpreted", lambda: False)
    kernel = tuning.autotune(configs, key=[])(prototype_ce._conclude_kernel)
    choices = []
    monkeypatch.setattr(Autotuner, "run", lambda self, *args, **kwargs: choices.append(self.configs))
    kernel[(1,)]()
    torch.use_deterministic_algorithms(True)
    try:
        kernel[(1,)]()
    finally:
        torch.use_deterministic_algorithms(False)
    kernel[(1,)]()
    assert choices == [configs, configs[:1], configs]
