"""A step keeps its tensors on its device: tested on torch's "meta" device, which has shapes, no values, and is not the CPU.

On a machine without a GPU, no other test finds a CPU tensor that a step uses by mistake.
"""

from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from importlib import import_module

import pytest
import torch
from engine.tiny_run import (
    COMBINATIONS,
    MetricsInMemory,
    NoiseLoader,
    tiny_run,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchlight.engine import assembly
from patchlight.engine.parallel import Mesh
from patchlight.records import Views

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Fails where an operation gets tensors of two devices. Scalars are allowed, as on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2, f"{function} got tensors of {devices}: {[tuple(t.shape) for t in tensors]}"
        return function(*args, **(kwargs or {}))


class MetaLoader(NoiseLoader):
    def __next__(self) -> Views:
        return to_meta(super().__next__())


def to_meta(record):
    if isinstance(record, Tensor):
        return record.to(META)
    if not is_dataclass(record):
        return record
    return replace(record, **{f.name: to_meta(getattr(record, f.name)) for f in fields(record)})


@pytest.fixture
def allow_meta(monkeypatch):
    """Turns off checks that fail on this device only: its tensors have no addresses, and it has no autocast."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(assembly, "check_teacher_student", lambda *_: None)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **o: nullcontext() if kind == "meta" else autocast(kind, *a, **o)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)


def test_a_tensor_on_another_device_is_found():
    with OneDevice(), pytest.raises(AssertionError, match="got tensors of"):
        torch.ones(2, device=META) + torch.ones(2)


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "lamb"])
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_step_stays_on_its_device(options, optimizer, tmp_path, allow_meta):
    run = tiny_run(
        tmp_path, options=options, optim={"name": optimizer}, parallel={"accumulate": 2}, model={"drop_path": 0.2}
    )
    mesh, metrics = Mesh(META), MetricsInMemory()
    training = assembly.build_trainer(run, mesh, MetaLoader(run, mesh), metrics)
    for _ in range(2):
        training.step_values.write(training.clock)
        with OneDevice():
            training.metrics.add(training.device_step([next(training.loader) for _ in range(2)]))
    elsewhere = [name for name, term in metrics.steps[-1].items() if term.device != META]
    assert not elsewhere
