"""What is special about class_attention: which rows are read, shared rows, packed projections, the folded query, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity import assert_as_exact_as_pytorch, every_runner, needs_gpu, outcome, running

from patchlight_kernels import class_attention, force, registry
from patchlight_kernels.ops.class_attention.op import OP

STATE = ("q", "k_self", "v_self")
SPEC = registry.spec("class_attention")


def arguments(device="cpu", images=2, patches=6, states=3, heads=1, width=8, k=2, dtype=torch.float32) -> dict:
    """Random tensors and an index of patches that exist; k=None reads all."""
    draw = lambda rows: torch.randn(images, rows, heads, width, dtype=dtype).to(device)
    tensors = {name: draw(states) for name in STATE} | {name: draw(patches) for name in ("k_patches", "v_patches")}
    index = None if k is None else torch.randint(0, patches, (images, states, k), dtype=torch.int32).to(device)
    return {**tensors, "index": index}


def run(device, name, given: dict) -> dict:
    """Output and gradients by name."""
    with running(device, name):
        return outcome(SPEC, given)


def test_the_reference_is_attention_over_a_list_of_keys():
    """Against PyTorch's attention, state by state, over the own key and those of the patches that exist."""
    given = arguments(dtype=torch.float64, k=3, heads=2)
    given["index"][0, 1, 2] = given["index"][1, 0, 0] = -1
    out = class_attention(**given)
    for image in range(2):
        for state in range(3):
            chosen = [patch for patch in given["index"][image, state].tolist() if patch >= 0]
            keys, values = (
                torch.cat([given[f"{x}_self"][image, state : state + 1], given[f"{x}_patches"][image, chosen]])
                for x in ("k", "v")
            )
            q = given["q"][image, state : state + 1]
            expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, keys, values)))
            torch.testing.assert_close(out[image, state], expected[:, 0])


@every_runner
def test_a_state_that_reads_no_patch_keeps_its_value(device, name):
    given = arguments(device, dtype=torch.bfloat16)
    given["index"][0] = -1
    given["index"][1, 0] = torch.tensor([-7, 6])  # outside of 0..5: no patch
    found = run(device, name, given)
    assert torch.equal(found["out"][0], given["v_self"][0].double())
    assert torch.equal(found["out"][1, 0], given["v_self"][1, 0].double())
    assert (found["gradient of k_patches"][0] == 0).all()
    assert (found["gradient of v_patches"][0] == 0).all()
    assert (found["gradient of q"][0] == 0).all()


@every_runner
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_read_changes_nothing(device, name, bad):
    """Missing neighbors read no row at all, not the first one with weight 0; nor do gradients."""
    given = arguments(device, patches=5)
    given["index"] = given["index"].clamp(1, 3)
    given["index"][:, :, 1] = -1
    clean = run(device, name, given)
    for x in ("k_patches", "v_patches"):
        given[x][:, [0, 4]] = bad
    dirty = run(device, name, given)
    for key, value in clean.items():
        assert torch.equal(value, dirty[key]), key
        assert value.isfinite().all(), key
    for x in ("k_patches", "v_patches"):
        assert (clean[f"gradient of {x}"][:, [0, 4]] == 0).all()


@every_runner
def test_nan_in_a_patch_reaches_its_readers_only(device, name):
    given = arguments(device, images=1, patches=4, states=2, k=1)
    given["index"][0, :, 0] = torch.tensor([1, 2])
    given["v_patches"][0, 1] = float("nan")
    found = run(device, name, given)
    assert found["out"][0, 0].isnan().all()
    assert found["out"][0, 1].isfinite().all()


@every_runner
def test_a_patch_named_twice_counts_twice(device, name):
    given = arguments(device, images=1, patches=2, states=1, k=2)
    given["index"][0, 0] = 1
    row = lambda x, place=0: given[x][0, place, 0]
    scores = torch.stack([row("q") @ row("k_self"), row("q") @ row("k_patches", 1)]) * 8**-0.5
    weights = torch.softmax(scores + torch.tensor([1.0, 2.0], device=device).log(), dim=0)
    expected = weights[0] * row("v_self") + weights[1] * row("v_patches", 1)
    torch.testing.assert_close(run(device, name, given)["out"][0, 0, 0].float(), expected)


@every_runner
def test_reading_all_is_reading_a_list_of_all(device, name):
    given = arguments(device, images=1, patches=7, states=2, width=16, k=None)
    listed = {**given, "index": torch.arange(7, dtype=torch.int32, device=device).expand(1, 2, -1)}
    everything, named = run(device, name, given), run(device, name, listed)
    for key, value in everything.items():
        torch.testing.assert_close(value, named[key], rtol=1e-5, atol=1e-6, msg=key)


@every_runner
def test_all_states_may_read_the_same_patch(device, name):
    """The longest list of readers: 320 of one patch, none of the others; equal bit for bit when done again."""
    given = arguments(device, images=1, patches=3, states=40, k=8, dtype=torch.bfloat16)
    given["index"][:] = 1
    first, second = (run(device, name, given) for _ in range(2))
    assert_as_exact_as_pytorch(SPEC, given, first, f"{name} on {device}")
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@every_runner
@pytest.mark.parametrize("k", [2, None])
def test_one_row_for_all_is_that_row_copied(device, name, k):
    """Forward bit for bit; gradients are the sums over all that shared the row."""
    given = arguments(device, states=3 if k else 1, k=k)
    for x in STATE:
        given[x] = given[x][:1, :1]
    copied = {**given, **{x: given[x].expand(2, 3 if k else 1, -1, -1).contiguous() for x in STATE}}
    shared, single = run(device, name, given), run(device, name, copied)
    assert torch.equal(shared["out"], single["out"])
    for x in STATE:
        expected = single[f"gradient of {x}"].sum(dim=(0, 1), keepdim=True)
        torch.testing.assert_close(shared[f"gradient of {x}"], expected, rtol=1e-5, atol=1e-6)


@every_runner
@pytest.mark.parametrize("k", [2, None])
def test_slices_of_a_packed_projection_need_no_copy(device, name, k):
    packed = torch.randn(2, 6, 2, 2, 8, device=device)  # images, patches, (key, value), heads, width
    given = arguments(device, states=3 if k else 1, heads=2, k=k)
    given |= {"k_patches": packed[:, :, 0], "v_patches": packed[:, :, 1]}
    args = OP.bind(**given)
    assert all(x.data_ptr() == given[key].data_ptr() for key, x in zip(given, args, strict=True) if x is not None)
    dense = {**given, "k_patches": packed[:, :, 0].contiguous(), "v_patches": packed[:, :, 1].contiguous()}
    for key, value in run(device, name, given).items():
        assert torch.equal(value, run(device, name, dense)[key]), key


@every_runner
@pytest.mark.parametrize("k", [3, None])
def test_far_apart_scores(device, name, k):
    """Weights from 1 down to nothing."""
    given = arguments(device, images=1, patches=6, states=4 if k else 1, width=16, k=k)
    given["q"] *= 20
    found = run(device, name, given)
    assert all(value.isfinite().all() for value in found.values())
    assert_as_exact_as_pytorch(SPEC, given, found, f"{name} on {device}")


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    given = arguments(images=3, heads=2, states=5, k=3)
    alone = run("cpu", "cpp", given)
    torch.set_num_threads(threads)
    for key, value in run("cpu", "cpp", given).items():
        assert torch.equal(value, alone[key]), key


def test_the_projections_of_the_first_block_fold_into_the_query():
    """SelfPatch's first block has one learned query: scores = LN(x) U^T, with U [heads, width] the key projection
    applied to the query, and without the key bias, which moves all scores of a head alike. No key is ever computed."""
    torch.manual_seed(0)
    heads, dim, patches = 3, 12, 5
    width, double = dim // heads, {"dtype": torch.float64}
    norm = torch.nn.LayerNorm(dim, **double)
    to_q, to_k, to_v = (torch.nn.Linear(dim, dim, **double) for _ in range(3))
    for parameter in (*norm.parameters(), *to_q.parameters(), *to_k.parameters(), *to_v.parameters()):
        torch.nn.init.normal_(parameter)
    token, x = torch.randn(1, 1, dim, **double), torch.randn(2, patches, dim, **double)
    index = torch.tensor([[[1, 4], [0, -1], [2, 3]], [[3, 2], [4, 4], [0, 1]]], dtype=torch.int32)
    split = lambda y: y.unflatten(-1, (heads, width))
    state, read = norm(token), norm(x)
    q, k_self, v_self = (split(project(state)) for project in (to_q, to_k, to_v))
    v_patches = split(to_v(read))
    expected = class_attention(q, k_self, v_self, split(to_k(read)), v_patches, index)

    u = torch.einsum("he,hed->hd", q[0, 0], to_k.weight.unflatten(0, (heads, width)))
    image, patch = torch.arange(2)[:, None, None], index.long()
    own = (state @ u.T).expand(2, 3, -1)[:, :, None]
    others = (read @ u.T)[image, patch].masked_fill((index < 0)[..., None], -torch.inf)
    weights = (torch.cat([own, others], dim=2) * width**-0.5).softmax(dim=2)  # [2, 3, 1 + k, heads]
    values = torch.cat([v_self.expand(2, 3, -1, -1)[:, :, None], v_patches[image, patch]], dim=2)
    folded = torch.einsum("mqkh,mqkhe->mqhe", weights, values)
    torch.testing.assert_close(folded, expected, rtol=1e-12, atol=1e-12)


def test_autocast_does_not_reach_into_the_reference():
    given = arguments()
    with force("reference"):
        outside = outcome(SPEC, given)
        with torch.autocast("cpu", torch.bfloat16):
            inside = outcome(SPEC, given)
    for key, value in outside.items():
        assert torch.equal(value, inside[key]), key


@pytest.mark.parametrize("k", [2, None])
def test_opcheck_of_the_backward(k):
    given = arguments(k=k, states=3 if k else 1)
    args = OP.bind(**given)
    out, lse = torch.ops.patchlight.class_attention_fwd(*args)
    torch.library.opcheck(torch.ops.patchlight.class_attention_bwd.default, (torch.randn_like(out), *args, lse))


@every_runner
def test_takes_a_gradient_of_any_layout(device, name):
    """The gradient of `out.sum()` is a single 1 with strides of 0; a transposed gradient has no dense rows."""
    given = arguments(device)
    leaves = {key: given[key].clone().requires_grad_() for key in SPEC.differentiable}
    with running(device, name):
        out = class_attention(**leaves, index=given["index"])
        ones = torch.autograd.grad(out, leaves.values(), torch.ones_like(out), retain_graph=True)
        summed = torch.autograd.grad(out.sum(), leaves.values(), retain_graph=True)
        transposed = torch.ones_like(out).transpose(1, 3).contiguous().transpose(1, 3)
        for gradients in (summed, torch.autograd.grad(out, leaves.values(), transposed)):
            assert all(torch.equal(a, b) for a, b in zip(ones, gradients, strict=True))


def test_benchmark_peers_agree():
    """The functions that benchmarks compare the op with compute the same."""
    peers = pytest.importorskip("bench.peers", reason="run from the repository root")
    for k in (3, None):
        given = arguments(dtype=torch.float64, heads=2, k=k)
        given["index"] = None if k is None else torch.rand(2, 3, 6).argsort(-1)[..., :k].int()  # no patch twice
        for peer in (peers.class_attention_official, peers.class_attention_smart, peers.class_attention_sdpa):
            torch.testing.assert_close(peer(**given), class_attention(**given), msg=peer.__name__)


GIVEN = arguments()
WRONG = {
    "rank": ({"q": GIVEN["q"][0]}, ValueError, r"q must be \[images, rows, heads, width\], got shape \(3, 1, 8\)"),
    "integers": ({"v_self": GIVEN["v_self"].long()}, TypeError, "v_self must be float32, .* got torch.int64; cast it"),
    "two dtypes": (
        {"k_patches": GIVEN["k_patches"].half()},
        TypeError,
        "k_patches must be torch.float32 like q, got torch.float16",
    ),
    "widths": ({"k_self": GIVEN["k_self"][..., :4]}, ValueError, r"k_self must have .* of q, \(1, 8\), got \(1, 4\)"),
    "a key without value": (
        {"v_patches": GIVEN["v_patches"][:, :5]},
        ValueError,
        r"v_patches must have the shape of k_patches, \(2, 6, 1, 8\), got \(2, 5, 1, 8\)",
    ),
    "states": ({"q": GIVEN["q"][:, :2]}, ValueError, r"q must have 2 \(or 1\) images of 3 \(or 1\) states, got 2 of 2"),
    "images": ({"k_self": GIVEN["k_self"].repeat(2, 1, 1, 1)}, ValueError, r"k_self must have 2 \(or 1\) images"),
    "a wide index": (
        {"index": GIVEN["index"].long()},
        TypeError,
        r"must be int32, got torch.int64; call index.int\(\)",
    ),
    "a flat index": ({"index": GIVEN["index"][0]}, ValueError, r"must be \[2 images, states, k\], got shape \(3, 2\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_rule_got_and_remedy(wrong):
    changed, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words) as caught:
        class_attention(**{**GIVEN, **changed})
    assert str(caught.value).startswith("class_attention: ")


def test_reasons_of_the_gpu_implementations():
    wide = arguments(width=300)
    with pytest.raises(RuntimeError, match="heads of width 300 exceed the 256"), running("cpu", "cuda"):
        class_attention(**wide)
    many = arguments(images=1, patches=24577, states=1, width=1)
    with pytest.raises(RuntimeError, match="24577 patches exceed the 24576"), running("cpu", "cuda"):
        class_attention(**many)


@pytest.mark.parametrize(
    ("images", "patches", "states", "k"),
    [(0, 4, 2, 2), (2, 0, 2, 2), (2, 4, 0, 2), (2, 4, 2, 0), (2, 0, 1, None), (0, 4, 1, None)],
)
def test_empty_in_is_a_defined_result(images, patches, states, k):
    given = arguments(images=images, patches=max(patches, 1), states=states, k=k)
    given |= {name: given[name][:, :patches] for name in ("k_patches", "v_patches")}
    given["index"] = None if k is None else torch.full((images, states, k), -1, dtype=torch.int32)
    found = outcome(SPEC, given)
    assert torch.equal(found["out"], given["v_self"].double())
    assert all(found[f"gradient of {key}"].shape == given[key].shape for key in SPEC.differentiable)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in ("triton", "cuda")])
def test_offsets_beyond_32_bits(name):
    rows = torch.randn(1, 196, 6, 64, device="cuda", dtype=torch.bfloat16)
    rows = rows.expand(29000, -1, -1, -1).contiguous()  # 2.2e9 values
    index = torch.randint(0, 196, (1, 1, 4), dtype=torch.int32, device="cuda").expand(29000, 196, -1).contiguous()
    with running("cuda", name):
        out = class_attention(rows, rows, rows, rows, rows, index)
    assert torch.equal(out[0], out[-1])
