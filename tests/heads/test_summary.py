"""Summaries, and neighbors aggregated once per patch against once per gathered copy."""

import copy
import statistics

import pytest
import torch
from dispatched import dispatched
from torch.utils._pytree import tree_leaves

from patchlight.heads.summary import (
    ClassAttentionBlock,
    ClassAttentionSummary,
    ClassTokenSummary,
    MeanSummary,
    mean_of_neighbors,
    select_neighbors,
)
from patchlight.objectives.interface import NeighborRule
from patchlight.records import Tokens
from patchlight_kernels import class_attention, extension, force

M, GRID, D = 2, (3, 4), 8
N = GRID[0] * GRID[1]


@pytest.fixture(autouse=True)
def _reference_ops():
    with force("reference"):  # the ops have their own tests
        yield


def some_tokens(cls=False, dtype=torch.float32) -> Tokens:
    patches = torch.randn(M, N, D, dtype=dtype, requires_grad=True)
    return Tokens(torch.randn(M, D, dtype=dtype) if cls else None, patches, GRID)


def moved_head(**options) -> ClassAttentionSummary:
    """A head with random parameters: at the start biases are 0 and norms do nothing."""
    head = ClassAttentionSummary(D, heads=2, **options)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def test_class_token_summary_passes_tokens_on():
    tokens = some_tokens(cls=True)
    result = ClassTokenSummary()(tokens)
    assert result.summary is tokens.cls
    assert result.patches is tokens.patches
    assert result.aggregated is None


def test_mean_summary():
    tokens = some_tokens()
    plain, normed = MeanSummary()(tokens), MeanSummary(D)(tokens)
    torch.testing.assert_close(plain.summary, tokens.patches.mean(1))
    torch.testing.assert_close(normed.patches, torch.nn.functional.layer_norm(tokens.patches, (D,), eps=1e-6))
    torch.testing.assert_close(normed.summary, normed.patches.mean(1))


@pytest.mark.parametrize("rule", [NeighborRule(k=3), NeighborRule(k=8, border="clip"), NeighborRule(radius=None, k=5)])
def test_each_patch_attends_to_its_neighbors_as_the_summary_does_to_all(rule):
    """The aggregate of patch i is the summary of an image that holds only i's neighbors; gradients included."""
    tokens, head = some_tokens(), moved_head()
    index = select_neighbors(tokens, rule)
    missing = (index < 0).sum().item()
    assert (missing > 0) == (rule.border == "clip")
    leaves = [tokens.patches, *head.parameters()]
    upstream = torch.randn(M, N, D)

    aggregated = head(tokens, rule).aggregated
    ours = torch.autograd.grad(aggregated, leaves, upstream)

    alone = torch.empty(M, N, D)
    for image in range(M):
        for patch in range(N):
            chosen = index[image, patch][index[image, patch] >= 0].long()
            few = Tokens(None, tokens.patches[image : image + 1, chosen], (1, len(chosen)))
            alone[image, patch] = head(few).summary[0]
    torch.testing.assert_close(aggregated, alone, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(alone, leaves, upstream)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4)


def test_summary_and_patches_do_not_depend_on_neighbors():
    tokens, head = some_tokens(), moved_head()
    plain, teacher = head(tokens), head(tokens, NeighborRule(k=2))
    assert plain.aggregated is None
    torch.testing.assert_close(plain.summary, teacher.summary)
    torch.testing.assert_close(plain.patches, teacher.patches)
    torch.testing.assert_close(plain.patches, head.norm(tokens.patches))


def _block_outcome(block, patches, summary, alone: bool) -> dict[str, torch.Tensor]:
    """The summary and its gradients, as the only state or beside aggregates that do not matter."""
    states = summary
    if not alone and len(summary) > 1:
        states = torch.cat([summary, torch.zeros(M * N, D, dtype=summary.dtype)])
    state = block(patches, states, None if alone else torch.zeros(M, N, 1, dtype=torch.int32))[:M]
    leaves = {"patches": patches, "summary": summary, **dict(block.named_parameters())}
    gradients = torch.autograd.grad(state, leaves.values(), torch.ones_like(state).cumsum(-1))
    return {"state": state, **dict(zip(leaves, gradients, strict=True))}


one_state_or_many = pytest.mark.parametrize("states", [1, M], ids=["one state for all", "a state per image"])


@one_state_or_many
def test_a_summary_alone_needs_no_keys_and_values_of_patches(states):
    block, patches = moved_head().blocks[0].double(), some_tokens(dtype=torch.float64).patches
    summary = torch.randn(states, D, dtype=torch.float64, requires_grad=True)
    folded, projected = (_block_outcome(block, patches, summary, alone) for alone in (True, False))
    for name, value in folded.items():
        torch.testing.assert_close(value, projected[name], rtol=1e-11, atol=1e-11, msg=name)


class OfficialBlock(ClassAttentionBlock):
    """Keys and values of all rows, as released."""

    def _attend_unprojected(self, state, x):
        rows = torch.cat([state.expand(len(x), -1, -1), x], dim=1)
        q, k, v = (
            self._split(project(y)).transpose(1, 2) for project, y in ((self.q, state), (self.k, rows), (self.v, rows))
        )
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
        return (weights @ v).squeeze(2)


@one_state_or_many
def test_a_summary_alone_is_as_exact_under_autocast(states):
    """On average over the state and all gradients at most twice as far from float64 as the official form."""
    block, official, patches = moved_head().blocks[0], OfficialBlock(D, heads=2), some_tokens().patches
    official.load_state_dict(block.state_dict())
    summary = torch.randn(states, D, requires_grad=True)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (patches, summary)]
    exact = _block_outcome(copy.deepcopy(block).double(), *leaves, alone=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (_block_outcome(b, patches, summary, alone=True) for b in (block, official))
    del exact["k.bias"]  # it has no gradient but noise
    mine, usual = (
        statistics.mean(((found[name] - truth).norm() / truth.norm()).item() for name, truth in exact.items())
        for found in (ours, theirs)
    )
    assert mine <= 2 * usual


def test_a_block_projects_its_patches_and_its_states_by_one_product_each():
    """q, k, v of the token are one product, k and v of the patches another, and all states share proj and the MLP's two."""
    tokens, head = some_tokens(), ClassAttentionSummary(D, heads=2, depth=1)
    with torch.no_grad(), force(neighbor_topk="cpp" if extension.missing("cpp") is None else "reference"):
        _, counter = dispatched(head, tokens, NeighborRule(k=8))
        with torch.autocast("cpu", torch.bfloat16):
            _, rounded = dispatched(head, tokens, NeighborRule(k=8))
    assert sum(name.startswith(("aten::addmm", "aten::mm")) for name in counter.names) == 5, counter.names
    assert rounded.casts() <= 20, rounded.names  # 23 of 44 before, in two blocks


def test_mean_pool_is_the_mean_of_existing_normalized_neighbors():
    tokens, head = some_tokens(), moved_head()
    rule = NeighborRule(k=6, border="clip", pool="mean")
    index = select_neighbors(tokens, rule)
    result = head(tokens, rule)
    for image in range(M):
        for patch in range(N):
            chosen = index[image, patch][index[image, patch] >= 0].long()
            torch.testing.assert_close(result.aggregated[image, patch], result.patches[image, chosen].mean(0))
    assert (index[:, 0] >= 0).sum().item() == M * 3  # a corner has three


def test_the_tensors_of_the_record_are_found():
    """FSDP2 hooks the tensors that it finds in a module's output."""
    result = MeanSummary()(some_tokens())
    assert [leaf for leaf in tree_leaves(result) if leaf is result.patches]


@pytest.mark.parametrize("head", [ClassTokenSummary(), MeanSummary()])
def test_every_summary_can_take_the_mean_of_neighbors(head):
    tokens = some_tokens(cls=True)
    rule = NeighborRule(k=2, pool="mean")
    expected = mean_of_neighbors(tokens.patches, select_neighbors(tokens, rule))
    torch.testing.assert_close(head(tokens, rule).aggregated, expected)


def test_missing_neighbors_get_no_gradient():
    patches = torch.randn(1, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 4, 1, 3, dtype=torch.float64)
    index = torch.tensor([[[2, -1], [2, 3], [-1, -1], [3, -1]]], dtype=torch.int32)
    out = class_attention(state, state, state, patches, patches, index)
    torch.testing.assert_close(out[0, 2], state[0, 2])  # itself alone
    out.sum().backward()
    assert (patches.grad[0, :2] == 0).all()  # patches 0 and 1 are no patch's neighbors
    assert (patches.grad[0, 2:] != 0).all()


@pytest.mark.parametrize("index", [None, torch.tensor([[[1, -1], [2, 0]], [[0, 1], [2, -1]]], dtype=torch.int32)])
def test_gradcheck_of_the_attention(index):
    states = 1 if index is None else 2
    own = [torch.randn(2, states, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    others = [torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: class_attention(*x, index), (*own, *others))


def test_the_released_initialization():
    head = ClassAttentionSummary(192, heads=3)
    assert len(head.blocks) == 2
    assert head.blocks[0].mlp.fc1.out_features == 768
    for tensor in (head.cls_token, head.blocks[1].k.weight, head.blocks[0].mlp.fc2.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
    assert all((layer.bias == 0).all() for layer in head.modules() if isinstance(layer, torch.nn.Linear))


@pytest.mark.parametrize("rule", [None, NeighborRule(k=4), NeighborRule(k=4, border="clip", pool="mean")])
def test_compiles_whole(rule):
    tokens, head = some_tokens(), moved_head()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")(tokens, rule)
    eager = head(tokens, rule)
    torch.testing.assert_close(compiled.summary, eager.summary, rtol=1e-4, atol=1e-5)
    if rule is not None:
        torch.testing.assert_close(compiled.aggregated, eager.aggregated, rtol=1e-4, atol=1e-5)


def test_autocast_stays_near_fp32():
    tokens, head, rule = some_tokens(), ClassAttentionSummary(D, heads=2), NeighborRule(k=4)
    expected = head(tokens, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(tokens, rule)
    assert got.aggregated.dtype == torch.float32
    torch.testing.assert_close(got.aggregated, expected.aggregated, rtol=0, atol=0.05)
    torch.testing.assert_close(got.summary, expected.summary, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassTokenSummary()(some_tokens()), "must have a class token, got tokens without one"),
        (lambda: ClassAttentionSummary(D, 2)(some_tokens(cls=True)), "got tokens with a class token"),
        (lambda: ClassAttentionSummary(D, 3), "heads must divide dim, got 3 and 8"),
        (lambda: ClassAttentionSummary(D, 2, depth=0), "depth must be at least 1, got 0"),
        (lambda: ClassAttentionSummary(D, 2)(some_tokens(), NeighborRule(pool="max")), "got 'max'"),
        (lambda: ClassTokenSummary()(some_tokens(cls=True), NeighborRule()), "'mean' only, got pool='class_attention'"),
        (lambda: MeanSummary()(some_tokens(), NeighborRule()), "MeanSummary: neighbors can be pooled by 'mean' only"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
