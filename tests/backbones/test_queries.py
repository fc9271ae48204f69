"""Queries in the vision transformer: the same numbers as two separate streams, and nothing changes for raw tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchlight.backbones.positions import sincos
from patchlight.backbones.vit import DropPath, VisionTransformer
from patchlight.records import Queries, QueryContent

CROPS, EACH = 3, 4  # query crops, patches of each


def small_vit(**options) -> VisionTransformer:
    sizes = {"width": 16, "depth": 3, "heads": 2, "patch_size": 4, "image_size": 16, "positions": "sincos"}
    vit = VisionTransformer(**{**sizes, **options}).double()
    nn.init.normal_(vit.mask_token)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms too
    return vit


def inputs(images: int = 2) -> tuple[Tensor, Tensor]:
    pixels = torch.randn(images, 3, 16, 16, dtype=torch.float64)
    return pixels, 8 * torch.rand(images, CROPS * EACH, 2, dtype=torch.float64) - 2


def attend(block: nn.Module, source: Tensor, *targets: Tensor) -> Tensor:
    """The block's attention branch: queries from one sequence, keys and values from others, by explicit probabilities."""
    heads = block.attn.num_heads
    q, _, _ = block.attn.qkv(block.norm1(source)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    _, k, v = block.attn.qkv(block.norm1(torch.cat(targets, 1))).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return block.attn.proj((probabilities @ v).transpose(1, 2).flatten(2))


def two_streams(
    vit: VisionTransformer, pixels: Tensor, queries: Queries, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Raw tokens and queries, each as a stream of its own in every block. tokens: the queries before positions are added."""
    x, y = vit.embed(pixels), vit.mask_token if tokens is None else tokens
    y = y + sincos(queries.positions, vit.width)
    for block in vit.blocks:
        if queries.keys == "joint":
            x, y = x + attend(block, x, x, y), y + attend(block, y, x, y)
            x, y = (s + block.mlp(block.norm2(s)) for s in (x, y))
            continue
        if queries.keys == "raw":
            attended = attend(block, y, x)
        elif queries.crop:
            attended = torch.cat([attend(block, part, x, part) for part in y.split(queries.crop, 1)], 1)
        else:
            attended = attend(block, y, x, y)
        x, y = x + attend(block, x, x), y + attended
        x, y = (s + block.mlp(block.norm2(s)) for s in (x, y))
    return vit.norm(x), vit.norm(y)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("keys", "crop"), [("all", None), ("all", EACH), ("raw", None), ("joint", None)])
def test_one_sequence_is_two_streams(keys, crop, class_token):
    vit, (pixels, positions) = small_vit(class_token=class_token), inputs()
    queries = Queries(positions, keys, crop)
    tokens = vit(pixels, queries=queries)
    raw, expected = two_streams(vit, pixels, queries)
    torch.testing.assert_close(tokens.patches, raw[:, int(class_token) :], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tokens.queries, expected, rtol=1e-10, atol=1e-12)
    weights = [p for p in vit.parameters() if p.requires_grad]
    cotangent = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((q * cotangent).sum(), weights) for q in (tokens.queries, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_queries_do_not_change_other_tokens(dtype):
    vit, (pixels, positions) = small_vit().to(dtype), inputs()
    pixels, mask = pixels.to(dtype), torch.rand(2, 16) < 0.3
    with_queries, alone = vit(pixels, mask, (0, 2), Queries(positions.to(dtype))), vit(pixels, mask, (0, 2))
    near = {"rtol": 0, "atol": 50 * torch.finfo(dtype).eps}
    torch.testing.assert_close(with_queries.cls, alone.cls, **near)
    torch.testing.assert_close(with_queries.patches, alone.patches, **near)
    torch.testing.assert_close(with_queries.layers, alone.layers, **near)
    assert alone.queries is None
    with_queries.patches.square().sum().backward()
    others = Queries(positions.to(dtype) + 1)
    torch.testing.assert_close(vit(pixels, mask, queries=others).patches, with_queries.patches, **near)


def test_joint_queries_change_the_class_token_and_the_patches():
    """Each by its own: the paper's direct input, with the inputs of one sequence."""
    vit, (pixels, positions) = small_vit(), inputs()
    joint, alone = vit(pixels, layers=(0,), queries=Queries(positions, "joint")), vit(pixels, layers=(0,))
    for a, b in ((joint.cls, alone.cls), (joint.patches, alone.patches), (joint.layers[0], alone.layers[0])):
        assert ((a - b).abs().amax(dim=-1) > 1e-6).all()
    x = torch.cat([vit.embed(pixels), vit.mask_token + sincos(positions, vit.width)], dim=1)
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)
    torch.testing.assert_close(joint.cls, x[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(joint.queries, x[:, -CROPS * EACH :], rtol=1e-10, atol=1e-12)


def content_of(images: int, hidden: float = 0.5) -> QueryContent:
    """Query crops of 2 x 2 patches of 4 pixels, the first position seen and the last hidden."""
    mask = torch.rand(images, CROPS * EACH) < hidden
    mask[:, 0], mask[:, -1] = False, True
    return QueryContent(torch.randn(images, CROPS, 3, 8, 8, dtype=torch.float64), mask)


@pytest.mark.parametrize("keys", ["all", "joint"])
def test_seen_positions_have_the_patch_of_their_query_crop(keys):
    """Two views of two images: the same content beside both views of an image, patch by patch."""
    vit, (pixels, positions) = small_vit(), inputs(4)
    content = content_of(2)
    tokens = vit.mask_token.expand(4, CROPS * EACH, -1).clone()
    for row in range(4):
        for place in (~content.mask[row % 2]).nonzero().flatten().tolist():
            crop, (y, x) = content.pixels[row % 2, place // EACH], divmod(place % EACH, 2)
            patch = crop[None, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            tokens[row, place] = F.conv2d(patch, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias).flatten()
    queries = Queries(positions, keys, content=content)
    result = vit(pixels, queries=queries)
    raw, expected = two_streams(vit, pixels, queries, tokens)
    torch.testing.assert_close(result.queries, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.patches, raw[:, 1:], rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(expected)
    weights = [vit.patch_embed.proj.weight, vit.mask_token]
    ours, theirs = (torch.autograd.grad((out * cotangent).sum(), weights) for out in (result.queries, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_content_that_is_hidden_everywhere_is_no_content():
    vit, (pixels, positions) = small_vit(), inputs()
    content = content_of(2)
    content.mask.fill_(True)
    hidden = vit(pixels, queries=Queries(positions, content=content)).queries
    assert torch.equal(hidden, vit(pixels, queries=Queries(positions)).queries)


def test_wrong_queries_are_refused():
    vit, (pixels, positions) = small_vit(), inputs()
    with pytest.raises(ValueError, match='with keys="joint" queries attend to all queries, got crop=4, to those'):
        vit(pixels, queries=Queries(positions, "joint", EACH))
    content = QueryContent(content_of(2).pixels, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2, 12\)"):
        vit(pixels, queries=Queries(positions, content=content))


def test_outputs_have_the_order_of_the_queries():
    vit, (pixels, positions) = small_vit(), inputs()
    order = torch.randperm(CROPS * EACH)
    original, permuted = vit(pixels, queries=Queries(positions)), vit(pixels, queries=Queries(positions[:, order]))
    torch.testing.assert_close(permuted.queries, original.queries[:, order])


def test_both_streams_drop_their_paths_separately():
    """Over many samples, each stream loses a branch at the rate, independently of the other."""
    vit = small_vit(drop_path=0.4, depth=2)
    assert isinstance(vit.blocks[1].drop_path1, DropPath)
    block, raw = vit.blocks[1], 3
    x = torch.randn(1, 5, 16, dtype=torch.float64).expand(4000, -1, -1)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_(), block.mlp.fc2.bias.zero_()
        moved = block(x, raw) - x
        kept = moved.abs().sum(-1) > 0  # [samples, tokens]
        full = block.eval()(x[:1], raw) - x[:1]
    first, second = kept[:, 0], kept[:, -1]
    assert torch.equal(kept, torch.stack([first] * raw + [second] * 2, 1))
    error = 4 * (0.24 / 4000) ** 0.5
    assert abs(first.double().mean() - 0.6) < error
    assert abs(second.double().mean() - 0.6) < error
    assert abs((first & second).double().mean() - 0.36) < error
    torch.testing.assert_close(moved[kept], (full / 0.6).expand_as(moved)[kept])


def test_queries_work_compiled_and_under_autocast():
    vit, (pixels, positions) = small_vit().float(), inputs()
    pixels, queries = pixels.float(), Queries(positions.float())
    plain = vit(pixels, queries=queries)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vit(pixels, queries=queries).queries.float()
    assert 0 < (rounded - plain.queries).abs().max() < 0.1
    for block in vit.blocks:
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(vit(pixels, queries=queries).queries, plain.queries)


@pytest.mark.parametrize("keys", ["all", "joint"])
def test_partly_seen_queries_work_compiled_and_under_autocast(keys):
    vit, (pixels, positions) = small_vit().float(), inputs()
    content = content_of(2)
    queries = Queries(positions.float(), keys, content=QueryContent(content.pixels.float(), content.mask))
    plain = vit(pixels.float(), queries=queries).queries
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vit(pixels.float(), queries=queries).queries.float()
    assert 0 < (rounded - plain).abs().max() < 0.1
    torch._dynamo.reset()
    compiled = torch.compile(vit, dynamic=False, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels.float(), queries=queries).queries, plain)
    torch._dynamo.reset()  # else these sizes count among those of the next test that compiles a network


def test_learned_positions_cannot_take_queries():
    vit, (pixels, positions) = small_vit(positions="learned"), inputs()
    with pytest.raises(ValueError, match=r'got a learned table; build it with positions="sincos"'):
        vit(pixels, queries=Queries(positions))
