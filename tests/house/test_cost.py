"""The gauge without a GPU: it counts what a GPU would run, and no method's step becomes dearer unseen."""

import os
import re
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from engine.tiny_run import DINO, IBOT, PQCL, SELFPATCH, SERE, on_processes, tiny_run, tiny_trainer
from parity import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchlight.engine.parallel import processes
from patchlight_kernels import force

pytest.importorskip("bench.cost", reason="run from the repository root")
from bench.cost import pinned
from bench.cost.count import Counter
from bench.cost.fake_gpu import GPU, backward, fake_gpu
from bench.cost.hardware import Hardware, names
from bench.cost.kernels import chunks
from bench.cost.ranks import Layout, Network, layouts
from bench.cost.records import HOST_COPY, HOST_READ, Kernel
from bench.cost.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Message, traffic_of


def test_no_step_is_dearer_than_the_table():
    """`python -m bench cost --update-table` writes the table anew, where a step is dearer on purpose."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "ssl"))
    command = [sys.executable, "-m", "bench.cost.pinned"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_dearer_step_is_named():
    table = [{"method": "dino", "depth": "2", "phase": "teacher", "launches": "100", "gb": "2.0", "waits": "0"}]
    row = {"method": "dino", "depth": 2, "phase": "teacher", "launches": 100, "gb": 2.0, "waits": 0}
    assert not list(pinned.dearer([row], table))
    (sentence,) = pinned.dearer([row | {"launches": 104}], table)
    assert sentence.startswith("dino, teacher") and "got 104 launches where the table says 100" in sentence
    (sentence,) = pinned.dearer([row | {"gb": 2.1}], table)
    assert "2.1 gb" in sentence and pinned.UPDATE in sentence
    assert list(pinned.dearer([row | {"waits": 1}], table))
    assert list(pinned.dearer([row | {"phase": "cue"}], table)), "a phase that the table does not know"


def test_a_linear_layer_counts_as_on_a_gpu():
    """Under autocast: x, weight and bias are converted, the product adds the bias; a view costs nothing."""
    with fake_gpu():
        layer, x = nn.Linear(8, 16, device=GPU), torch.ones(4, 6, 8, device=GPU)
        counter = Counter()
        with counter, torch.autocast("cuda", torch.bfloat16):
            y = layer(x).flatten(0, 1)
    assert y.dtype == torch.bfloat16 and y.device == GPU
    kernels = sorted((launch.kernel for launch in counter.launches), key=lambda kernel: kernel.bytes)
    rows, inputs, outputs = 24, 8, 16
    assert [kernel.name for kernel in kernels] == [*["aten._to_copy"] * 3, "aten.addmm"]
    assert [kernel.bytes for kernel in kernels] == [
        6 * outputs,
        6 * inputs * outputs,
        6 * rows * inputs,
        2 * (rows * inputs + inputs * outputs + outputs + rows * outputs),
    ]
    assert kernels[-1].flops == 2 * rows * inputs * outputs


def test_a_broadcast_operand_is_read_once():
    with fake_gpu():
        x, row = torch.ones(100, 10, device=GPU), torch.ones(10, device=GPU)
        counter = Counter()
        with counter:
            x + row.expand(100, 10)
    (launch,) = counter.launches
    assert launch.kernel.bytes == 4 * (1000 + 10 + 1000)


def test_a_read_by_the_host_is_seen():
    with fake_gpu():
        counter = Counter()
        with counter:
            torch.ones((), device=GPU).item()
    assert [launch.kernel.kind for launch in counter.launches][-1] == HOST_READ


def test_a_copy_from_the_host_waits_unless_it_may_not():
    with fake_gpu():
        counter, x = Counter(), torch.ones(3)
        with counter:
            torch.tensor([1.0, 2.0], device=GPU)
            x.to(GPU, non_blocking=True)
    assert [launch.kernel.kind for launch in counter.launches] == [HOST_COPY, "memcpy"]


def test_gradients_are_those_of_the_engine():
    """Shared and broadcast parameters, a conversion, a node written in Python, a part that gets no gradient."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    layer, scale, x = nn.Linear(5, 5), nn.Parameter(torch.rand(1, 5)), torch.randn(7, 5)
    leaves = [*layer.parameters(), scale]

    def loss():
        y = Doubled.apply(layer(layer(x) * scale)) + layer.bias
        first, _ = y.double().split(3, dim=1)
        return (first.exp() + torch.addmm(scale.double(), y.double(), layer.weight.double())[:, :3]).mean()

    loss().backward()
    wanted = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    backward(loss())
    for leaf, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


COMPILED = """
import torch
from torch import nn
from bench.cost.compiled import compile_branch, compiler_sees_a_gpu
from bench.cost.count import Counter
from bench.cost.fake_gpu import GPU, fake_gpu

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


counter = Counter()
with fake_gpu(), compiler_sees_a_gpu(counter.add):
    branch = Branch().to(GPU)
    x = torch.ones(32, 64, device=GPU)
    compile_branch(branch, lambda call: call)
    branch(x).sum().backward()
    counter.launches.clear()
    with counter:
        branch(x).sum().backward()
for launch in counter.launches:
    print(launch.kernel.name, launch.kernel.bytes, sep=",")
"""


def test_compiled_code_is_counted():
    """Of a linear layer, GELU and a linear layer: the products stay, GELU is a kernel of the compiler, also its gradient."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "ssl"))
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.split(",") for line in run.stdout.splitlines()]
    names = [name for name, _ in rows]
    products = [name for name in names if name in ("aten.addmm", "aten.mm")]
    assert len(products) == 5, f"two forward, three backward, as x needs no gradient: {names}"
    assert [int(size) for name, size in rows if name == "triton_poi_fused_gelu"] == [2 * 4 * 32 * 128]
    assert any("gelu_backward" in name for name in names)
    assert "aten.gelu" not in names


def test_lists_are_cut_as_pytorch_cuts_them():
    assert list(chunks([10] * 111, 110)) == [1100, 10]
    assert list(chunks([1 << 16, 1], 110)) == [(1 << 16) + 1]
    assert list(chunks([321 << 16], 110)) == [320 << 16, 1 << 16]
    assert sum(chunks([70_000_000, 5, 0, 7], 36)) == 70_000_012


@pytest.mark.parametrize("name", names())
def test_every_constant_says_where_it_comes_from(name):
    text = (ROOT / f"bench/hardware/{name}.toml").read_text()
    assert not re.findall(r"^\w+ = [\d.]+\s*$", text, re.MULTILINE)
    hardware = Hardware.load(name)
    large = Kernel("aten.add", "elementwise", bytes=10**9)
    assert 200 < hardware.microseconds(large) < 1000
    assert hardware.microseconds(Kernel("aten.add", "elementwise")) > 0
    assert hardware.wall_ms(1.0, 1000, graph=False) > hardware.wall_ms(1.0, 1000, graph=True) >= 1.0


def test_faster_memory_makes_a_step_faster():
    kernel = Kernel("aten.add", "elementwise", bytes=10**9)
    assert Hardware.load("h200").microseconds(kernel) < Hardware.load("h100").microseconds(kernel)


class Traffic(TorchDispatchMode):
    """Collectives as they are sent, of groups with more than one process: kind and bytes."""

    KINDS: ClassVar = {
        "allreduce_": ALL_REDUCE, "_allgather_base_": ALL_GATHER, "_reduce_scatter_base_": REDUCE_SCATTER
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        kind = self.KINDS.get(function._schema.name.removeprefix("c10d::"))
        groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
        if kind and max(map(members, groups)) > 1:
            self.sent.append((kind, max(x.numel() * x.element_size() for x in leaves if isinstance(x, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def members(found: torch.ScriptObject) -> int:
    """How many processes a group has; 0 for another object, such as the kind of a reduction."""
    try:
        return dist.ProcessGroup.unbox(found).size()
    except (RuntimeError, TypeError, ValueError):
        return 0


def send_one_step(run) -> list[tuple[str, int]]:
    with force(neighbor_topk="reference"), processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        trainer.step()
        with Traffic() as traffic:
            trainer.step()
    return sorted(traffic.sent)


@pytest.mark.parametrize(
    ("options", "count", "shard"),
    [((DINO, SELFPATCH), 2, 1), ((DINO, SELFPATCH), 4, 2), ((IBOT, SERE), 2, 2), ((IBOT, PQCL), 4, 4)],
    ids=["replicas", "shards of 2", "batch norm", "full shards"],
)
def test_messages_are_those_that_processes_send(options, count, shard, tmp_path):
    alone = tiny_trainer(tiny_run(tmp_path / "alone", options=options))
    alone.step()
    counted = [(m.kind, m.bytes) for m in traffic_of(alone).messages(count // shard, shard, gpu=False)]
    parts = {"parallel": {"shard": shard}, "data": {"batch_per_rank": 8 // count}}
    sent = on_processes(count, send_one_step, tiny_run(tmp_path / "ranks", options=options, **parts))[0]
    assert sorted(counted) == sent


def test_messages_take_longer_over_more_nodes():
    network = Network(**Hardware.load("h200").table["network"])
    message = Message("gradients", ALL_REDUCE, "replicate", 10**8)
    times = [network.milliseconds(message, Layout(gpus, 1)) for gpus in (8, 64, 512)]
    assert times == sorted(times) and times[0] < times[1] / 1.5
    assert times[0] == pytest.approx(2 * 7 / 8 * 1e8 / 400e6 + 0.015, rel=1e-6)
    neighbors = Message("weights", ALL_GATHER, "shard", 10**8)
    assert network.shape(neighbors, Layout(8, 8)) == (8, 1)
    assert network.shape(message, Layout(8, 8)) == (1, 8), "copies of one shard are on different nodes"
    assert [layout.title for layout in layouts(64, 8)] == ["replicas", "shards of 8", "full shards"]
