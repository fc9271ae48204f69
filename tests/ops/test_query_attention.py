"""What is special about query_attention: which rows are read, packed projections, sizes beyond one tile, precision, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import RUNNERS, TORCH_RUNNERS, assert_as_exact_as_pytorch, needs_gpu, outcome, running, widened
from torch._subclasses.fake_tensor import FakeTensorMode

from patchlight_kernels import force, hardware, query_attention, registry
from patchlight_kernels.ops.query_attention import torch_attention
from patchlight_kernels.ops.query_attention.op import OP

SPEC = registry.spec("query_attention")
READS = {"all": {}, "raw": {"query_keys": "raw"}, "crop": {"crop": 2}}
every_runner = pytest.mark.parametrize(("device", "name"), RUNNERS + TORCH_RUNNERS)
every_reading = pytest.mark.parametrize("reading", READS)


def arguments(device="cpu", images=2, raw=5, queries=4, heads=2, width=8, dtype=torch.float32, **reading) -> dict:
    qkv = torch.randn(images, raw + queries, 3, heads, width, dtype=dtype).to(device)
    return {"qkv": qkv, "raw": raw, "query_keys": "all", "crop": None, **reading}


def may_read(raw: int, tokens: int, query_keys: str, crop: int | None) -> torch.Tensor:
    """Which token reads which, one by one."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for row in range(tokens):
        for key in range(tokens):
            siblings = crop is None or (row - raw) // crop == (key - raw) // crop
            mask[row, key] = key < raw or (row >= raw and query_keys == "all" and siblings)
    return mask


def masked(qkv: torch.Tensor, raw: int, query_keys: str, crop: int | None) -> torch.Tensor:
    """PyTorch's attention under the mask."""
    mask = may_read(raw, qkv.shape[1], query_keys, crop).to(qkv.device)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def pytorchs_errors(given: dict) -> dict[str, float]:
    """How far PyTorch's attention under the mask is from float64."""
    plain = replace(SPEC, public=masked)
    exact, found = outcome(plain, widened(given)), outcome(plain, given)
    return {key: (value - exact[key]).abs().max().item() for key, value in found.items()}


def run(device, name, given: dict) -> dict:
    with running(device, name):
        return outcome(SPEC, given)


@every_reading
def test_the_reference_is_attention_under_a_mask(reading):
    """Forward and gradient in float64, against PyTorch's own."""
    given = arguments(dtype=torch.float64, **READS[reading])
    qkv, upstream = given["qkv"].requires_grad_(), torch.randn(2, 9, 2, 8, dtype=torch.float64)
    result, expected = query_attention(**given), masked(**given)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, qkv, upstream)[0] for out in (result, expected)))


@every_reading
def test_the_reference_gradient_is_the_derivative(reading):
    given = arguments(images=1, raw=2, heads=1, width=2, dtype=torch.float64, **READS[reading])
    qkv = given.pop("qkv").requires_grad_()
    with force("reference"):
        torch.autograd.gradcheck(lambda x: query_attention(x, **given), qkv)


def test_queries_do_not_change_raw_tokens():
    """Without queries the raw rows are the same, bit for bit; and with crops each crop is as if it were alone."""
    given = arguments(crop=2)
    whole = query_attention(**given)
    alone = query_attention(given["qkv"][:, :5], 5)
    assert torch.equal(whole[:, :5], alone)
    for first in (5, 7):
        tokens = [*range(5), first, first + 1]
        assert torch.equal(whole[:, tokens], query_attention(given["qkv"][:, tokens], 5))


def test_queries_behind_one_another_are_one_crop():
    given = arguments()
    assert torch.equal(query_attention(**given), query_attention(**given | {"crop": 4}))


@every_runner
@every_reading
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_read_changes_nothing(device, name, reading, bad):
    """NaN in a query reaches its readers only, forward and backward."""
    if name == "torch" and reading == "crop":
        pytest.skip("takes one crop only")
    given = arguments(device, images=1, raw=3, heads=1, **READS[reading])
    readers = may_read(3, 7, given["query_keys"], given["crop"])[:, 6]
    readers[6] = True
    clean = run(device, name, given)
    given["qkv"][0, 6] = bad
    found = run(device, name, given)
    assert torch.equal(found["out"][0, ~readers], clean["out"][0, ~readers])
    if (device, name) != ("cpu", "torch"):  # PyTorch's attention for CPUs makes 0 of it, so only tests use it
        assert found["out"][0, 6].isnan().all()
    others = ~may_read(3, 7, given["query_keys"], given["crop"])[readers].any(dim=0) & ~readers
    assert torch.equal(found["gradient of qkv"][0, others], clean["gradient of qkv"][0, others])
    queries = found["gradient of qkv"][0, ~readers, 0]
    assert torch.equal(queries, clean["gradient of qkv"][0, ~readers, 0])


@every_runner
def test_far_apart_scores(device, name):
    """Probabilities from 1 down to nothing."""
    given = arguments(device, images=1, heads=1, width=16)
    given["qkv"] *= 20
    found = run(device, name, given)
    assert all(value.isfinite().all() for value in found.values())
    # PyTorch's attention for CPUs takes exp to 20 units in the last place on some of them, also where nobody packs anything.
    also = pytorchs_errors(given) if (device, name) == ("cpu", "torch") else None
    assert_as_exact_as_pytorch(SPEC, given, found, f"{name} on {device}", also)


@every_runner
@pytest.mark.parametrize("raw", [1, 16, 17])
def test_keys_behind_the_last_do_not_count(device, name, raw):
    """Scores all far below zero: a missing key, whose score would be 0, must have no weight. And the other way round."""
    for sign in (-1, 1):
        given = arguments(device, images=1, raw=raw, queries=2, heads=1)
        given["qkv"][:, :, 0], given["qkv"][:, :, 1] = 10.0, 10.0 * sign
        found = run(device, name, given)
        mean = given["qkv"][0, :raw, 2].double().mean(dim=0)
        torch.testing.assert_close(found["out"][0, 0], mean, rtol=1e-5, atol=1e-6)
        assert found["gradient of qkv"].isfinite().all()


@every_runner
def test_strides_of_the_projection_need_no_copy(device, name):
    """A slice of a wider product, image and token dimensions exchanged."""
    given = arguments(device)
    wide = torch.randn(9, 2, 3 * 2 * 8 + 5, device=device)
    view = wide[..., 3:-2].unflatten(-1, (3, 2, 8)).transpose(0, 1)
    view.copy_(given["qkv"])
    args = OP.bind(**given | {"qkv": view})
    assert args[0].data_ptr() == view.data_ptr()
    dense = run(device, name, given)
    for key, value in run(device, name, given | {"qkv": view}).items():
        if (device, name) == ("cpu", "torch"):  # PyTorch's sums may have another order where rows lie elsewhere
            torch.testing.assert_close(value, dense[key], rtol=1e-5, atol=1e-6, msg=key)
        else:
            assert torch.equal(value, dense[key]), key


@every_runner
def test_takes_a_gradient_of_any_layout(device, name):
    """The gradient of `out.sum()` is a single 1 with strides of 0; a transposed gradient has no dense rows."""
    given = arguments(device, images=1, heads=1)
    given["qkv"].requires_grad_()
    with running(device, name):
        out = query_attention(**given)
        ones = torch.autograd.grad(out, given["qkv"], torch.ones_like(out), retain_graph=True)[0]
        summed = torch.autograd.grad(out.sum(), given["qkv"], retain_graph=True)[0]
        transposed = torch.ones_like(out).transpose(1, 3).contiguous().transpose(1, 3)
        assert torch.equal(ones, summed)
        assert torch.equal(ones, torch.autograd.grad(out, given["qkv"], transposed)[0])


@pytest.mark.parametrize("sizes", [(197, 36, None), (785, 8, 4), (64, 128, 32)])
@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_of_training_on_the_cpu(sizes, threads):
    raw, queries, crop = sizes
    given = arguments(images=1, raw=raw, queries=queries, heads=3, width=64, crop=crop)
    torch.set_num_threads(threads)
    for name in ("cpp", "torch") if crop is None else ("cpp",):
        found = run("cpu", name, given)
        assert_as_exact_as_pytorch(SPEC, given, found, f"{name}, {sizes}, {threads} threads")
        again = run("cpu", name, given)
        assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_is_as_exact_as_pytorchs_own_attention(dtype):
    """In 16 bits the reference rounds probabilities, as PyTorch does: it must not be less exact than that.

    Compared on the average of all values, as the largest error depends on chance.
    """
    given = arguments(raw=37, queries=8, width=64, dtype=dtype)
    exact = outcome(SPEC, given | {"qkv": given["qkv"].double()})
    leaf, generator = given["qkv"].requires_grad_(), torch.Generator().manual_seed(1)
    upstream = torch.randn(2, 45, 2, 64, generator=generator, dtype=torch.float64).to(dtype)
    with force("reference"):
        result = outcome(SPEC, given)
    q, k, v = (x.transpose(1, 2) for x in leaf.unbind(2))
    mask = may_read(37, 45, "all", None)
    scores = (q @ k.mT * 64**-0.5).float().masked_fill(~mask, -torch.inf)  # as autocast runs the release
    out = (scores.softmax(dim=-1).to(dtype) @ v).transpose(1, 2)
    expected = {"out": out, "gradient of qkv": torch.autograd.grad(out, leaf, upstream)[0]}
    for key, value in exact.items():
        assert (result[key] - value).square().mean() <= (expected[key].double() - value).square().mean(), key


@every_reading
def test_opcheck_of_the_backward(reading):
    args = OP.bind(**arguments(**READS[reading]))
    out, lse = torch.ops.patchlight.query_attention_fwd(*args)
    given = (torch.randn_like(out), args[0], out, lse, *args[1:])
    torch.library.opcheck(torch.ops.patchlight.query_attention_bwd.default, given)


def test_autocast_does_not_reach_into_the_reference():
    given = arguments()
    with force("reference"):
        outside = outcome(SPEC, given)
        with torch.autocast("cpu", torch.bfloat16):
            inside = outcome(SPEC, given)
    assert all(torch.equal(outside[key], inside[key]) for key in outside)


def test_benchmark_peers_agree():
    """The functions that benchmarks compare the op with compute the same."""
    peers = pytest.importorskip("bench.peers", reason="run from the repository root")
    for reading in READS.values():
        given = arguments(dtype=torch.float64, **reading)
        for peer in (peers.query_attention_official, peers.query_attention_sdpa, peers.query_attention_masked):
            torch.testing.assert_close(peer(**given), query_attention(**given), msg=peer.__name__)
    given = arguments(queries=0)
    torch.testing.assert_close(peers.query_attention_sdpa(**given), query_attention(**given))


WRONG = {
    "rank": ({"qkv": torch.zeros(2, 9, 48)}, ValueError, r"\[images, tokens, 3, heads, width\], got shape \(2, 9, 48\)"),
    "parts": ({"qkv": torch.zeros(2, 9, 2, 2, 8)}, ValueError, r"got shape \(2, 9, 2, 2, 8\)"),
    "integers": ({"qkv": torch.zeros(2, 9, 3, 2, 8, dtype=torch.long)}, TypeError, "got torch.int64; cast it"),
    "no raw token": ({"raw": 0}, ValueError, "raw must be between 1 and the 9 tokens, got 0"),
    "too many": ({"raw": 10}, ValueError, "raw must be between 1 and the 9 tokens, got 10"),
    "half a token": ({"raw": 4.5}, TypeError, "raw must be a Python integer, got float"),
    "a tensor": ({"raw": torch.tensor(5)}, TypeError, "raw must be a Python integer, got torch.Tensor"),
    "reading": ({"query_keys": "none"}, ValueError, r"one of \('all', 'raw'\), got 'none'"),
    "part of a crop": ({"crop": 3}, ValueError, "divide the 4 queries, got 3"),
    "no crop": ({"crop": 0}, ValueError, "divide the 4 queries, got 0"),
    "crops unread": ({"crop": 2, "query_keys": "raw"}, ValueError, "crop must be None .*, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_rule_got_and_remedy(wrong):
    changed, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words) as caught:
        query_attention(**arguments() | changed)
    assert str(caught.value).startswith("query_attention: ")
    assert ";" in str(caught.value), "no remedy"


@pytest.mark.parametrize(("name", "width", "limit"), [("cuda", 65, 64), ("triton", 129, 128)])
def test_heads_too_wide_for_a_gpu(name, width, limit):
    with pytest.raises(RuntimeError, match=f"width {width} exceed the {limit}"), running("cpu", name):
        query_attention(**arguments(width=width))


@pytest.mark.parametrize("other", ["reference", "cpp"])
@pytest.mark.parametrize(("forward", "backward"), [("torch", None), (None, "torch")])
def test_flash_attention_saves_and_reads_what_others_do(other, forward, backward):
    given = arguments()
    exact = run("cpu", "reference", given)["gradient of qkv"]
    qkv, generator = given["qkv"].requires_grad_(), torch.Generator().manual_seed(1)
    upstream = torch.randn(2, 9, 2, 8, generator=generator, dtype=torch.float64).float()
    with running("cpu", forward or other):
        out = query_attention(**given | {"qkv": qkv})
    with running("cpu", backward or other):
        gradient = torch.autograd.grad(out, qkv, upstream)[0]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-5)


def on_a_gpu(monkeypatch) -> FakeTensorMode:
    """A mode in which tensors on a GPU exist, without memory."""
    monkeypatch.setattr(hardware, "_gpu_too_old", lambda index: None)
    return FakeTensorMode()


@pytest.mark.parametrize("crop", [0, 36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_takes_the_packed_projection(monkeypatch, dtype, crop):
    """The calls of PyTorch's kernels for GPUs, as far as their shapes, strides and types; no copy of the projection."""
    with on_a_gpu(monkeypatch):
        qkv = torch.empty(2, 233, 3, 6, 64, dtype=dtype, device="cuda")
        assert OP.reasons(qkv, 197, crop)[1][1] is None
        out, lse = torch_attention.query_attention_fwd(qkv, 197, crop)
        promised = torch.ops.patchlight.query_attention_fwd(qkv, 197, crop)
        assert [(x.shape, x.dtype, x.stride()) for x in (out, lse)] == [
            (x.shape, x.dtype, x.stride()) for x in promised
        ]
        gradient = torch_attention.query_attention_bwd(torch.empty_like(out), qkv, out, lse, 197, crop)
        assert gradient.shape == qkv.shape and gradient.is_contiguous()
        assert all(part._is_view() for part in torch_attention.heads_of(qkv))


UNFIT = {
    "16-bit numbers only": {"dtype": torch.float32},
    "heads of 8, 16, ... 256 channels, not 20": {"width": 20},
    "not 264": {"width": 264},
    "multiples of 16 bytes": {"offset": 4},
    "keys that are not adjacent": {"crop": 2},
}


@pytest.mark.parametrize("words", UNFIT)
def test_what_flash_attention_does_not_take(monkeypatch, words):
    given = {"dtype": torch.bfloat16, "width": 16, "offset": 0, "crop": 4} | UNFIT[words]
    with on_a_gpu(monkeypatch):
        size = 2 * 9 * 3 * 2 * given["width"]
        flat = torch.empty(size + given["offset"], dtype=given["dtype"], device="cuda")
        qkv = flat[given["offset"] :].view(2, 9, 3, 2, given["width"])
        assert words in {impl.name: reason for impl, reason in OP.reasons(qkv, 5, given["crop"])}["torch"]


def test_flash_attention_is_for_gpus():
    reasons = {impl.name: reason for impl, reason in OP.reasons(*OP.bind(**arguments()))}
    assert "loses a NaN" in reasons["torch"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in ("triton", "cuda")])
def test_offsets_beyond_32_bits(name):
    rows = torch.randn(1, 233, 3, 6, 64, device="cuda", dtype=torch.bfloat16)
    rows = rows.expand(8100, -1, -1, -1, -1).contiguous()  # 2.2e9 values
    with running("cuda", name):
        out = query_attention(rows, 197)
    assert torch.equal(out[0], out[-1])
