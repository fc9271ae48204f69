"""adamw against torch's optimizer and lerp; what stays when a step is refused or frozen; tables of addresses."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from parity import SEED, every_runner, running
from torch import Tensor

from patchlight_kernels import adamw, addresses, registry

SHAPES = ((5,), (70, 60), (), (1,), (3, 0), (4097,), (2, 3, 5))
DECAYED = [len(shape) != 1 for shape in SHAPES]
FROZEN = [number in (1, 3) for number in range(len(SHAPES))]
LISTS = ("parameters", "exp_avgs", "exp_avg_sqs", "teachers", "copies", "teacher_copies")


def draw(seed: int, device: str, size: float = 1.0) -> list[Tensor]:
    stream = torch.Generator().manual_seed(1000 * SEED + seed)
    return [(torch.randn(shape, generator=stream) * size).to(device) for shape in SHAPES]


def state(device: str, copies: torch.dtype = torch.bfloat16) -> dict:
    """A network before its first step; the second parameter's teacher is missing."""
    parameters = draw(0, device)
    teachers = draw(1, device)
    teachers[1] = teachers[1].new_empty(0)
    return {
        "parameters": parameters,
        "exp_avgs": [torch.zeros_like(p) for p in parameters],
        "exp_avg_sqs": [torch.zeros_like(p) for p in parameters],
        "steps": torch.zeros(len(parameters), device=device),
        "teachers": teachers,
        "copies": [torch.zeros_like(p, dtype=copies) for p in parameters],
        "teacher_copies": [torch.zeros_like(t, dtype=copies) for t in teachers],
        "decayed": DECAYED,
        "frozen": FROZEN,
    }


def numbers(device: str, lr=0.01, weight_decay=0.3, momentum=0.9, freeze=0.0, refused=0.0) -> dict[str, Tensor]:
    values = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "freeze": freeze}
    found = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in values.items()}
    return found | {"refused": torch.tensor(refused, device=device)}


def scale_of(device: str) -> Tensor:
    return torch.linspace(0.2, 1.0, len(SHAPES), device=device)


def everything(given: dict) -> list[Tensor]:
    return [tensor.clone() for name in LISTS for tensor in given[name]] + [given["steps"].clone()]


@every_runner
@pytest.mark.parametrize("momentum", [0.9, 0.3, 0.0, 1.0])
def test_it_is_torchs_adamw_and_lerp(momentum, device, name):
    """Five steps whose rates move, beside torch.optim.AdamW in float64."""
    given = state(device)
    exact = [p.double().clone().requires_grad_() for p in given["parameters"]]
    teachers = [t.double() for t in given["teachers"]]
    groups = [{"params": [p for p, d in zip(exact, DECAYED, strict=True) if d == decayed]} for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    with running(device, name):
        for step in range(5):
            gradients = draw(2 + step, device, 10.0 ** (step - 3))
            rates = {"lr": 0.01 * (step + 1), "weight_decay": 0.3 - 0.05 * step, "momentum": momentum}
            adamw(**given, gradients=gradients, scale=scale_of(device), betas=(0.8, 0.95), **numbers(device, **rates))
            for p, gradient, scale in zip(exact, gradients, scale_of(device), strict=True):
                p.grad = gradient.double() * scale.double()
            for group, decay in zip(optimizer.param_groups, (rates["weight_decay"], 0.0), strict=True):
                group["lr"], group["weight_decay"] = rates["lr"], decay
            optimizer.step()
            for t, p in zip(teachers, exact, strict=True):
                if t.numel():
                    t.lerp_(p.detach(), 1 - momentum)
    for number, (p, t) in enumerate(zip(exact, teachers, strict=True)):
        torch.testing.assert_close(given["parameters"][number].double(), p.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(given["teachers"][number].double(), t, rtol=2e-6, atol=2e-6)
        for ours, theirs in (("exp_avgs", "exp_avg"), ("exp_avg_sqs", "exp_avg_sq")):
            expected = optimizer.state[p][theirs]
            size = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(given[ours][number].double(), expected, rtol=0, atol=2e-6 * size)
        assert torch.equal(given["copies"][number], given["parameters"][number].bfloat16())
        assert torch.equal(given["teacher_copies"][number], given["teachers"][number].bfloat16())
    assert (given["steps"] == 5).all()


@every_runner
def test_a_refused_step_changes_nothing(device, name):
    given = state(device)
    before = everything(given)
    gradients = [torch.full_like(p, torch.nan) for p in given["parameters"]]
    with running(device, name):
        adamw(**given, gradients=gradients, scale=scale_of(device) * torch.nan, **numbers(device, refused=1.0))
    assert all(torch.equal(a, b) for a, b in zip(everything(given), before, strict=True))


@every_runner
@pytest.mark.parametrize("gradient", ["given", "none"])
def test_what_is_frozen_or_has_no_gradient_stays_and_its_teacher_follows(gradient, device, name):
    given, whole = state(device), state(device)
    gradients: list[Tensor | None] = list(draw(2, device))
    with running(device, name):
        adamw(**whole, gradients=gradients, scale=scale_of(device), **numbers(device))
        if gradient == "none":
            gradients = [None if stays else g for g, stays in zip(gradients, FROZEN, strict=True)]
        freeze = {"freeze": float(gradient == "given")}
        adamw(**given, gradients=gradients, scale=scale_of(device), **numbers(device, **freeze))
    fresh = state(device)
    for number, stays in enumerate(FROZEN):
        for key in ("parameters", "exp_avgs", "exp_avg_sqs", "steps"):
            assert torch.equal(given[key][number], (fresh if stays else whole)[key][number]), key
        if stays and number != 1:  # the one without a teacher
            t, p = fresh["teachers"][number], fresh["parameters"][number]
            torch.testing.assert_close(given["teachers"][number], t.lerp(p, 0.1))
        assert torch.equal(given["copies"][number], given["parameters"][number].bfloat16())


@every_runner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_and_copies_in_16_bits(dtype, device, name):
    given, exact = state(device, dtype), state(device, dtype)
    gradients = [g.to(dtype) for g in draw(2, device)]
    with running(device, name):
        adamw(**given, gradients=gradients, scale=scale_of(device), **numbers(device))
        adamw(**exact, gradients=[g.float() for g in gradients], scale=scale_of(device), **numbers(device))
    assert all(torch.equal(a, b) for a, b in zip(everything(given), everything(exact), strict=True))
    assert torch.equal(given["copies"][1], given["parameters"][1].to(dtype))


@every_runner
def test_addresses_that_are_not_aligned(device, name):
    given, moved = state(device), state(device)
    for key in LISTS:
        moved[key] = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in moved[key]]
    gradients = draw(2, device)
    with running(device, name):
        for one in (given, moved):
            adamw(**one, gradients=gradients, scale=scale_of(device), **numbers(device))
    for a, b in zip(everything(given), everything(moved), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_parameter_in_another_layout_runs_the_reference():
    given = state("cpu")
    given["parameters"][1] = given["parameters"][1].t().contiguous().t()
    spec = registry.spec("adamw")
    args = spec.op.bind(**given, gradients=draw(2, "cpu"), scale=scale_of("cpu"), **numbers("cpu"))
    assert spec.op.choose(*args).name == "reference"
    whole = state("cpu")
    adamw(**given, gradients=draw(2, "cpu"), scale=scale_of("cpu"), **numbers("cpu"))
    adamw(**whole, gradients=draw(2, "cpu"), scale=scale_of("cpu"), **numbers("cpu"))
    for a, b in zip(everything(given), everything(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_autograd_sees_that_parameters_change():
    given = state("cpu")
    leaf = given["parameters"][1].requires_grad_()
    loss = leaf.square().sum()
    adamw(**given, gradients=draw(2, "cpu"), scale=scale_of("cpu"), **numbers("cpu"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"lr": 0.1}, r"adamw: lr must be a 0-d tensor on cpu, got 0\.1; make it one\."),
        ({"scale": torch.ones(2)}, r"scale must have a value on cpu for each of the 7 parameters, got shape \(2,\)"),
        ({"teachers": [torch.zeros(5)]}, r"teachers must have a tensor for each of the 7 parameters, got 1"),
        (
            {"exp_avgs": [torch.zeros(6)] * 7},
            r"exp_avgs\[0\] must be \(5,\) on cpu like the parameter, got \(6,\) on cpu",
        ),
        ({"gradients": [None] * 3}, r"gradients must have a tensor or None for each of the 7 parameters, got 3"),
        ({"parameters": []}, r"there must be parameters, got none"),
        ({"decayed": [True]}, "decayed must be a list that says yes or no for each of the 7 parameters, got 1"),
    ],
)
def test_errors(changes, error):
    given = state("cpu") | {"gradients": draw(2, "cpu"), "scale": scale_of("cpu")} | numbers("cpu") | changes
    with pytest.raises(ValueError, match=error):
        adamw(**given)


def test_a_table_is_made_once_for_the_same_addresses():
    rows = ((1, 2), (3, 4))
    device = torch.device("cpu")
    with mock.patch.object(addresses, "_recent", type(addresses._recent)()):
        first = addresses.table_of(rows, device)
        assert first.tolist() == [[1, 2], [3, 4]]
        assert addresses.table_of(rows, device) is first
        for number in range(addresses.MOST_RECENT):
            addresses.table_of(((number, 2), (5, 6)), device)
        assert addresses.table_of(rows, device) is not first


def test_a_table_of_a_graph_stays_and_is_not_taken_for_another_call():
    """A copy that a graph holds has not happened when the graph is captured."""
    rows, device = ((7, 8), (9, 10)), torch.device("cuda", 0)
    pairs = mock.Mock(side_effect=lambda values, device: (torch.zeros_like(values), torch.zeros_like(values)))
    with (
        mock.patch.object(addresses, "_recent", type(addresses._recent)()),
        mock.patch.object(addresses, "_of_graphs", []) as kept,
        mock.patch.object(addresses, "_spare", {}),
        mock.patch.object(addresses, "_pair", pairs),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing),
    ):
        capturing = False
        addresses.table_of(((1, 2), (3, 4)), device)
        made = pairs.call_count
        capturing = True
        of_graph = addresses.table_of(rows, device)
        assert pairs.call_count == made, "no pinned memory can be allocated during a capture"
        assert any(of_graph is tensor for tensors in kept for tensor in tensors)
        capturing = False
        assert addresses.table_of(rows, device) is not of_graph
        assert of_graph.tolist() == [list(row) for row in rows]


def test_blocks_cover_every_value_once():
    counts = (5, 0, addresses.CHUNK, addresses.CHUNK + 1, 3 * addresses.CHUNK - 1)
    blocks = addresses.blocks_of(counts, torch.device("cpu")).tolist()
    expected = [(0, 0), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (4, 2)]
    assert list(zip(*blocks, strict=True)) == expected
    assert addresses.first_blocks(counts) == (0, 1, 1, 2, 4)
