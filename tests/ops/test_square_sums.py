"""square_sums: independence of other tensors and of threads, layouts, what is not finite, errors."""

from __future__ import annotations

import pytest
import torch
from parity import SEED, every_runner, running

from patchlight_kernels import square_sums


def draw(*shapes: tuple[int, ...], device: str) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape, generator=stream).to(device) for shape in shapes]


@every_runner
def test_a_sum_does_not_depend_on_its_neighbors(device, name):
    tensors = draw((5000,), (3, 4), (), (12288,), device=device)
    with running(device, name):
        together = square_sums(tensors)
        for tensor, value in zip(tensors, together, strict=True):
            assert torch.equal(square_sums([tensor])[0], value)
        assert torch.equal(square_sums(tensors[::-1]), together.flip(0))


@every_runner
def test_only_the_tensor_that_is_not_finite_has_such_a_sum(device, name):
    tensors = draw((70,), (9000,), (20,), (30,), device=device)
    tensors[1][8999], tensors[2][0] = torch.nan, torch.inf
    with running(device, name):
        assert square_sums(tensors).isfinite().tolist() == [True, False, False, True]


@every_runner
def test_any_layout(device, name):
    (matrix,) = draw((70, 90), device=device)
    parts = [matrix.t(), matrix[:, 3:5], matrix.flatten()[1:], matrix[:0]]
    with running(device, name):
        result = square_sums(parts)
    expected = torch.stack([part.double().square().sum() for part in parts])
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)


def test_the_sum_does_not_depend_on_threads():
    tensors = draw((100_000,), (7,), device="cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = square_sums(tensors)
        torch.set_num_threads(2)
        assert torch.equal(square_sums(tensors), one)
    finally:
        torch.set_num_threads(before)


def test_errors():
    with pytest.raises(ValueError, match=r"square_sums: there must be tensors, got none"):
        square_sums([])
    with pytest.raises(TypeError, match=r"tensors\[1\] must be torch.float32 like tensors\[0\], got torch.float16"):
        square_sums([torch.ones(2), torch.ones(2).half()])
