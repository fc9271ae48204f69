"""What is special about neighbor_topk: ties, NaN, borders, sets, errors."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import SEED, cuda_kernels_on_cpu, every_runner, needs_gpu, running

from patchlight_kernels import explain, force, hardware, neighbor_topk
from patchlight_kernels.ops.neighbor_topk.op import OP
from patchlight_kernels.ops.neighbor_topk.reference import capacity, neighborhood


def select(device, name, x, *args, **kwargs):
    with running(device, name):
        return neighbor_topk(x.to(device), *args, **kwargs)


@every_runner
@pytest.mark.parametrize("radius", [1, 2, 3, None])
def test_ties_go_to_the_lower_index(device, name, radius):
    index = select(device, name, torch.ones(1, 56, 16), (7, 8), 5, radius=radius)
    expected = neighborhood(7, 8, -1 if radius is None else radius, True)[:, :5]
    assert torch.equal(index[0].cpu().long(), expected)


@every_runner
@pytest.mark.parametrize("radius", [1, 3])
def test_missing_neighbors_come_last(device, name, radius):
    x = torch.randn(2, 20, 12)
    k = capacity(4, 5, radius)
    index, score = select(device, name, x, (4, 5), k, radius=radius, border="clip", return_scores=True)
    table = neighborhood(4, 5, radius, False)
    for patch in range(20):
        found = index[0, patch].tolist()
        members = sorted(table[patch][table[patch] >= 0].tolist())
        assert sorted(found[: len(members)]) == members
        assert found[len(members) :] == [-1] * (k - len(members))
        assert torch.isneginf(score[0, patch, len(members) :]).all()
    if radius == 1:
        assert (index[0, 0] >= 0).sum() == 3, "a corner has three neighbors"


@every_runner
@pytest.mark.parametrize("radius", [1, 2, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_features_select_by_index_and_stay_in_range(device, name, radius, bad):
    x = torch.randn(1, 30, 20)
    x[0, 7, 3] = bad
    index, score = select(device, name, x, (5, 6), 4, radius=radius, return_scores=True)
    index, score = index.cpu(), score.cpu()
    table = neighborhood(5, 6, -1 if radius is None else radius, True)
    assert ((index >= 0) & (index < 30)).all()
    assert index[0, 7].tolist() == table[7, :4].tolist(), "a patch with NaN takes the lowest indices"
    assert score[0, 7].isnan().all()
    others = [p for p in range(30) if p != 7]
    assert (index[0, others] != 7).all(), "NaN ranks below every number"
    assert score[0, others].isfinite().all()


@every_runner
def test_a_zero_patch_has_cosine_0_with_all(device, name):
    x = torch.randn(1, 9, 8)
    x[0, 4] = 0
    index, score = select(device, name, x, (3, 3), 8, return_scores=True)
    assert (score[0, 4] == 0).all()
    assert index[0, 4].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


@every_runner
def test_a_patch_whose_squares_overflow_stops_nobody(device, name):
    """Its similarities are NaN. Threads of a block wait for one another, so what they skip must not depend on it."""
    x = torch.randn(1, 256, 16)
    x[0, 100] = 1e30
    index, score = select(device, name, x, (16, 16), 4, radius=3, border="clip", return_scores=True)
    with force("reference"):
        expected = neighbor_topk(x, (16, 16), 4, radius=3, border="clip")
    assert torch.equal(index.cpu()[0, 100], expected[0, 100])
    assert score[0, 100].isnan().all()


@pytest.mark.parametrize("radius", [1, None])
def test_more_images_than_a_launch_may_have_blocks_along_y(radius):
    """On a CPU kernels pretend that there may be 3, and on a GPU it is 65535."""
    x = torch.randn(7, 9, 6)
    index = select("cpu", "cuda", x, (3, 3), 2, radius=radius)
    for image in range(7):
        assert torch.equal(index[image], select("cpu", "cuda", x[image : image + 1], (3, 3), 2, radius=radius)[0])


@pytest.mark.parametrize("width", [64, 704, 768])
@pytest.mark.parametrize("radius", [1, 2, None])
@pytest.mark.parametrize("columns", [5, 72, 96])
def test_what_shared_memory_cannot_hold_is_a_reason_and_not_an_error(width, radius, columns):
    """With the shared memory of the smallest GPU, which kernels have on a CPU too."""
    x = torch.randn(1, 3 * columns, width)
    args = OP.bind(x, (3, columns), 2, radius, "clip")
    with cuda_kernels_on_cpu():
        reason = OP.impls[0].unsupported(*args)
        if reason is None:
            OP.impls[0].fwd(*args)
        else:
            assert "bytes of shared memory and this GPU has 101376" in reason
            with pytest.raises(RuntimeError, match="bytes of shared memory and this GPU has 101376"):
                OP.impls[0].fwd(*args)


def test_wide_rows_run_triton_on_a_gpu_with_little_shared_memory():
    """Stand-ins: a GPU of 99 KiB with both libraries."""
    x = torch.randn(1, 196, 768)
    with cuda_kernels_on_cpu(), mock.patch.object(hardware, "no_triton", lambda tensor: None):
        text = explain("neighbor_topk", x, (14, 14), 4, radius=None)
        reasons = {impl.name: reason for impl, reason in OP.reasons(*OP.bind(x, (14, 14), 4, None))}
    assert "cuda       its rows need 131456 bytes of shared memory and this GPU has 101376" in text
    assert reasons["triton"] is None


@every_runner
def test_a_scaled_patch_changes_nothing(device, name):
    x = torch.randn(1, 30, 32)
    scaled = x * torch.logspace(-3, 3, 30)[None, :, None]
    plain, _ = select(device, name, x, (5, 6), 4, return_scores=True)
    _, score = select(device, name, scaled, (5, 6), 4, return_scores=True)
    _, expected = select(device, name, x, (5, 6), 4, return_scores=True)
    torch.testing.assert_close(score, expected, rtol=0, atol=2e-6)
    assert plain.dtype == torch.int32


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    radius=st.one_of(st.none(), st.integers(1, 8)),
    wrap=st.booleans(),
    data=st.data(),
)
def test_any_grid_against_a_plain_loop(height, width, radius, wrap, data):
    """The default implementation against sets and Python's own sort."""
    most = capacity(height, width, -1 if radius is None else radius)
    if most == 0:
        return
    k = data.draw(st.integers(1, most))
    x = torch.randn(1, height * width, 5, generator=torch.Generator().manual_seed(height * 100 + width))
    index = neighbor_topk(x, (height, width), k, radius=radius, border="wrap" if wrap else "clip")[0].tolist()
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    for patch in range(height * width):
        members = set()
        for other in range(height * width):
            dy, dx = abs(other // width - patch // width), abs(other % width - patch % width)
            if wrap:
                dy, dx = min(dy, height - dy), min(dx, width - dx)
            if other != patch and (radius is None or max(dy, dx) <= radius):
                members.add(other)
        best = sorted(((unit[patch] @ unit[o]).item() for o in members), reverse=True)[:k]
        chosen = [o for o in index[patch] if o >= 0]
        assert set(chosen) <= members
        assert len(set(chosen)) == len(chosen) == min(k, len(members))
        torch.testing.assert_close(
            torch.tensor([(unit[patch] @ unit[o]).item() for o in chosen]), torch.tensor(best), rtol=0, atol=1e-6
        )


X = torch.randn(2, 12, 8)
WRONG = {
    "wrong rank": ((X[0], (3, 4), 2), {}, ValueError, r"\[images, patches, width\], got shape \(12, 8\)"),
    "grid that does not match": ((X, (3, 5), 2), {}, ValueError, "the 12 patches of x, got 3x5"),
    "k beyond the window": ((X, (3, 4), 9), {}, ValueError, "at most the 8 neighbors of radius=1 on a 3x4 grid, got 9"),
    "k beyond all": ((X, (3, 4), 12), {"radius": None}, ValueError, "at most the 11 neighbors .*, got 12"),
    "k below one": ((X, (3, 4), 0), {}, ValueError, "k must be at least 1 .*, got 0"),
    "radius below one": ((X, (3, 4), 1), {"radius": 0}, ValueError, "radius must be at least 1"),
    "unknown border": ((X, (3, 4), 1), {"border": "mirror"}, ValueError, "'wrap' or 'clip', got 'mirror'"),
    "integers": ((X.long(), (3, 4), 1), {}, TypeError, "got torch.int64; cast it"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_rule_got_and_remedy(wrong):
    args, kwargs, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words) as caught:
        neighbor_topk(*args, **kwargs)
    assert str(caught.value).startswith("neighbor_topk: ")


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 9, 0)])
def test_empty_in_is_a_defined_result(shape):
    index, score = neighbor_topk(torch.randn(shape), (3, 3), 2, return_scores=True)
    assert index.shape == score.shape == (shape[0], 9, 2)
    assert torch.equal(index.long(), neighborhood(3, 3, 1, True)[:, :2].expand(shape[0], -1, -1))


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in ("triton", "cuda")])
def test_offsets_beyond_32_bits(name):
    x = torch.randn(1, 196, 4096, device="cuda", dtype=torch.bfloat16).expand(2700, -1, -1).contiguous()  # 2.2e9 values
    with running("cuda", name):
        index = neighbor_topk(x, (14, 14), 4)
    assert torch.equal(index[0], index[-1])


@every_runner
@pytest.mark.parametrize("grid", [(7, 4), (4, 7), (1, 9), (2, 2)])
def test_a_clipped_grid_narrower_than_the_window_writes_every_place(grid, device, name):
    """All neighbors that a window can have, of which a corner has fewer: the rest are -1, each written once."""
    k = min(5, grid[0]) * min(5, grid[1]) - 1
    x = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(SEED)).to(device)
    torch.use_deterministic_algorithms(True)  # fills fresh memory
    try:
        with running(device, name):
            index, score = neighbor_topk(x, grid, k, radius=2, border="clip", return_scores=True)
    finally:
        torch.use_deterministic_algorithms(False)
    with force("reference"):
        expected = neighbor_topk(x, grid, k, radius=2, border="clip")
    assert torch.equal((index < 0).sum(-1), (expected < 0).sum(-1))
    assert torch.equal(score == -torch.inf, index < 0)
    assert torch.equal(index.sort().values, expected.sort().values)
