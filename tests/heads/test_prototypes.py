"""The prototype cross-entropy against its formula."""

import pytest
import torch

from patchlight.heads.prototypes import Prototypes
from patchlight.records import SoftTarget

T, S, R, D, K = 2, 3, 5, 4, 7


def some_case(dtype=torch.float64, bias=True, rows=R, train_norm=True):
    prototypes = Prototypes(D, K, train_norm).to(dtype)
    torch.nn.init.uniform_(prototypes.weight_g, 0.5, 2)
    target = SoftTarget(
        z=torch.randn(T, rows, D, dtype=dtype),
        prototypes=torch.randn(K, D, dtype=dtype),
        temperature=0.2,
        bias=torch.randn(K, dtype=dtype) if bias else None,
    )
    z = torch.randn(S, rows, D, dtype=dtype, requires_grad=True)
    pair_weight = torch.rand(T, S, dtype=dtype)
    pair_weight[0, 0] = 0
    return prototypes, z, target, pair_weight, torch.rand(rows, dtype=dtype)


def by_the_formula(prototypes, z, target, temperature, pair_weight, row_weight):
    """Every pair, every row, every probability written out."""
    bias = 0 if target.bias is None else target.bias
    w = prototypes.weight_g * torch.nn.functional.normalize(prototypes.weight_v, dim=1)
    loss = 0.0
    for t in range(len(target.z)):
        p = ((target.z[t] @ target.prototypes.T + bias) / target.temperature).softmax(-1)
        for s in range(len(z)):
            cross_entropy = -(p * (z[s] @ w.T / temperature).log_softmax(-1)).sum(-1)
            loss = loss + pair_weight[t, s] * (row_weight * cross_entropy).sum()
    return loss


def value_and_gradients(loss, *leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias):
    prototypes, z, target, pair_weight, row_weight = some_case(bias=bias)
    leaves = (z, prototypes.weight_g, prototypes.weight_v)
    result = value_and_gradients(prototypes(z, target, 0.3, pair_weight, row_weight), *leaves)
    expected = value_and_gradients(by_the_formula(prototypes, z, target, 0.3, pair_weight, row_weight), *leaves)
    torch.testing.assert_close(result, expected)


def test_rows_weigh_the_same_by_default():
    prototypes, z, target, pair_weight, _ = some_case()
    expected = by_the_formula(prototypes, z, target, 0.1, pair_weight, torch.full((R,), 1 / R))
    torch.testing.assert_close(prototypes(z, target, 0.1, pair_weight), expected)


def test_temperatures_may_be_tensors():
    prototypes, z, target, pair_weight, row_weight = some_case()
    on_device = SoftTarget(target.z, target.prototypes, torch.tensor(0.2, dtype=torch.float64), target.bias)
    expected = prototypes(z, target, 0.3, pair_weight, row_weight)
    temperature = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(prototypes(z, on_device, temperature, pair_weight, row_weight), expected)


def test_gradcheck():
    prototypes, z, target, pair_weight, row_weight = some_case()

    def loss(z, g, v):
        parameters = {"weight_g": g, "weight_v": v}
        return torch.func.functional_call(prototypes, parameters, (z, target, 0.5, pair_weight, row_weight))

    leaves = (prototypes.weight_g, prototypes.weight_v)
    assert torch.autograd.gradcheck(loss, (z, *(leaf.detach().requires_grad_() for leaf in leaves)))


def test_nothing_flows_into_the_target():
    prototypes, z, target, pair_weight, _ = some_case()
    leaves = [x.requires_grad_() for x in (target.z, target.prototypes, target.bias)]
    prototypes(z, target, 0.1, pair_weight).backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert z.grad is not None


def test_autocast_keeps_fp32():
    prototypes, z, target, pair_weight, row_weight = some_case(torch.float32)
    expected = prototypes(z, target, 0.1, pair_weight, row_weight), prototypes.logits(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = prototypes(z, target, 0.1, pair_weight, row_weight), prototypes.logits(z)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_half_precision_rows_are_computed_in_fp32():
    prototypes, z, target, pair_weight, row_weight = some_case(torch.float32)
    loss = prototypes(z.bfloat16(), target, 0.1, pair_weight, row_weight)
    assert loss.dtype == torch.float32
    expected = prototypes(z.bfloat16().float(), target, 0.1, pair_weight, row_weight)
    assert torch.equal(loss, expected)


def test_no_rows_give_a_zero_that_can_be_differentiated():
    prototypes, z, target, pair_weight, _ = some_case(rows=0)
    loss = prototypes(z, target, 0.1, pair_weight)
    loss.backward()
    assert loss == 0
    assert (prototypes.weight_v.grad == 0).all()


def test_extreme_logits_stay_finite():
    prototypes, z, target, pair_weight, row_weight = some_case(torch.float32)
    loss = prototypes(1e4 * z, target, 0.04, pair_weight, row_weight)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (z, prototypes.weight_v)))


def test_lengths_are_frozen_unless_trained():
    assert not Prototypes(4, 8).weight_g.requires_grad
    assert Prototypes(4, 8, train_norm=True).weight_g.requires_grad
    torch.testing.assert_close(Prototypes(4, 8).directions().norm(dim=1), torch.ones(8))


def test_logits_are_cosines_at_the_start():
    prototypes, z = Prototypes(16, 64), torch.nn.functional.normalize(torch.randn(2, 3, 16), dim=-1)
    logits = prototypes.logits(z)
    assert logits.shape == (2, 3, 64)
    expected = torch.cosine_similarity(z[..., None, :], prototypes.weight_v, dim=-1)
    torch.testing.assert_close(logits, expected)


def test_the_module_compiles_whole_under_autocast():
    prototypes, z, target, pair_weight, row_weight = some_case(torch.float32)
    expected = prototypes(z, target, 0.1, pair_weight, row_weight)
    compiled = torch.compile(prototypes, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(z, target, 0.1, pair_weight, row_weight), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(S, R, D + 1)}, r"z must be \[student views, rows, 4\], got \(3, 5, 5\)"),
        ({"z": torch.zeros(R, D)}, r"got \(5, 4\)"),
        ({"z": torch.zeros(S, R + 1, D)}, r"target.z must be \[teacher views, 6 rows"),
        ({"pair_weight": torch.zeros(S, T)}, r"= \(2, 3\), got \(3, 2\)"),
        ({"row_weight": torch.zeros(R + 1)}, r"a weight per row, 5, got \(6,\)"),
        ({"target": SoftTarget(torch.zeros(T, R, D), torch.zeros(K + 1, D), 0.1)}, "as the student, 7, got 8"),
    ],
)
def test_errors_say_what_to_do(change, message):
    prototypes, z, target, pair_weight, row_weight = some_case()
    given = {"z": z, "target": target, "pair_weight": pair_weight, "row_weight": row_weight, **change}
    with pytest.raises(ValueError, match=message):
        prototypes(given["z"], given["target"], 0.1, given["pair_weight"], given["row_weight"])


def test_an_error_at_build():
    with pytest.raises(ValueError, match="must be positive, got 4 and 0"):
        Prototypes(4, 0)
