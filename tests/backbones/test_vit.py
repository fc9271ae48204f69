"""The vision transformer: shapes, positions, masks, layers, stochastic depth, timm's names and initialization."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm import layers
from timm.models import vision_transformer as timm_vit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from patchlight.backbones.patches import PatchEmbed
from patchlight.backbones.positions import resize_matrix, resize_table
from patchlight.backbones.vit import Block, VisionTransformer, attention_map


def small_vit(**options) -> VisionTransformer:
    return VisionTransformer(**{"width": 24, "depth": 3, "heads": 2, "patch_size": 8, "image_size": 32, **options})


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40), (8, 8)])
def test_any_image_size(height, width, class_token):
    vit = small_vit(class_token=class_token)
    tokens = vit(torch.randn(2, 3, height, width), layers=(0, -1))
    rows, columns = tokens.grid
    assert (rows * 8, columns * 8) == (height, width)
    assert tokens.patches.shape == (2, rows * columns, 24)
    assert [layer.shape for layer in tokens.layers] == [(2, rows * columns + class_token, 24)] * 2
    if class_token:
        assert tokens.cls.shape == (2, 24)
    else:
        assert tokens.cls is None


@pytest.mark.parametrize("start", ["dino", "moco_v3"])
def test_queries_keys_and_values_without_biases(start):
    vit, with_biases = (small_vit(qkv_bias=bias, start=start) for bias in (False, True))
    assert with_biases.state_dict().keys() - vit.state_dict().keys() == {f"blocks.{n}.attn.qkv.bias" for n in range(3)}
    with_biases.load_state_dict(vit.state_dict(), strict=False)  # its biases start at zero
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(pixels).patches, with_biases(pixels).patches)
    torch.testing.assert_close(attention_map(vit, pixels), attention_map(with_biases, pixels))


def test_rows_and_columns_are_not_swapped():
    """A patch's embedding depends on its own pixels and position only, so one bright patch moves one row."""
    vit = small_vit(class_token=False)
    dark = torch.zeros(1, 3, 16, 40)
    bright = dark.clone()
    bright[:, :, 8:16, 24:32] = 1  # row 1, column 3
    moved = (vit.embed(bright) - vit.embed(dark)).abs().sum(-1)[0] > 0
    assert moved.nonzero().tolist() == [[1 * 5 + 3]]


def test_images_do_not_mix():
    vit = small_vit()
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(vit(pixels[1:2]).patches, vit(pixels).patches[1:2], rtol=1e-4, atol=1e-5)


def test_state_dict_and_features_are_those_of_timm():
    vit = VisionTransformer(width=192, depth=12, heads=3)
    state = vit.state_dict()
    assert state.pop("mask_token").shape == (1, 192)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    theirs.load_state_dict(state, strict=True)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = vit(pixels)
        torch.testing.assert_close(tokens.cls, theirs(pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens.patches, theirs.forward_features(pixels)[:, 1:], rtol=0, atol=1e-5)


def test_masked_patches_have_no_influence():
    vit = small_vit()
    torch.nn.init.normal_(vit.mask_token)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 5]] = True
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    masked, plain = vit(pixels, mask), vit(pixels)
    assert not torch.allclose(masked.patches[0], plain.patches[0], atol=1e-3)
    torch.testing.assert_close(masked.patches[1], plain.patches[1])
    masked.patches.square().sum().backward()
    hidden = mask.view(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(pixels)
    assert (pixels.grad[hidden] == 0).all()
    assert (pixels.grad[~hidden] != 0).float().mean() > 0.99
    assert vit.mask_token.grad.abs().min() > 0


def test_a_full_mask_leaves_positions():
    vit = small_vit(class_token=False)
    everything = torch.ones(1, 16, dtype=torch.bool)
    embedded = vit.embed(torch.randn(1, 3, 32, 32), everything)
    torch.testing.assert_close(embedded, vit.pos_embed)


@pytest.mark.parametrize("class_token", [True, False])
def test_intermediate_layers(class_token):
    vit = small_vit(class_token=class_token)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = vit(pixels, layers=(2, 0, -2))
    x, by_hand = vit.embed(pixels), []
    for block in vit.blocks:
        x = block(x)
        by_hand.append(vit.norm(x) if class_token else x)
    for got, number in zip(tokens.layers, (2, 0, 1), strict=True):
        assert torch.equal(got, by_hand[number])
    assert torch.equal(tokens.layers[0][:, int(class_token) :], tokens.patches)


def test_attention_map_has_the_weights_of_the_block():
    vit = small_vit(depth=2)
    pixels = torch.randn(2, 3, 16, 24)
    attention = attention_map(vit, pixels)
    assert attention.shape == (2, 2, 7, 7)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 7))
    block = vit.blocks[1]
    x = block.norm1(vit.blocks[0](vit.embed(pixels)))
    values = block.attn.qkv(x)[..., 48:].unflatten(-1, (2, 12)).transpose(1, 2)
    torch.testing.assert_close(block.attn.proj((attention @ values).transpose(1, 2).flatten(2)), block.attn(x))


def test_a_block_computes_what_timms_does():
    block, x = small_vit().double().blocks[1], torch.randn(2, 5, 24, dtype=torch.float64)
    outputs = [forward(block, x) for forward in (Block.forward, timm_vit.Block.forward)]
    torch.testing.assert_close(*outputs)
    weights, upstream = list(block.parameters()), torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(output, weights, upstream) for output in outputs))


def test_attention_is_fused(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(qkv) or fused(*qkv))
    vit = small_vit(depth=3)
    vit(torch.randn(1, 3, 16, 16))
    assert len(calls) == 3


def test_a_table_of_the_right_size_is_not_resized():
    vit = small_vit()
    assert vit.positions((4, 4)) is vit.pos_embed


@pytest.mark.parametrize("resize", ["released", "size"])
def test_resized_positions_keep_the_class_row(resize):
    vit = small_vit(position_resize=resize)
    resized = vit.positions((2, 5))
    assert resized.shape == (1, 11, 24)
    assert torch.equal(resized[:, 0], vit.pos_embed[:, 0])


def test_the_two_resizes_differ_as_stated():
    table = torch.randn(1, 16, 4)
    image = table.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    plain = F.interpolate(image, size=(6, 3), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resize_table(table, (4, 4), (6, 3), "size"), plain)
    assert (resize_table(table, (4, 4), (6, 3), "released") - plain).abs().max() > 1e-3


def test_released_resize_samples_where_it_says():
    """Rows are read at (i + 0.5) * 7 / 5.1 - 0.5 by the cubic kernel with A = -0.75, borders repeated."""
    column = torch.randn(7, dtype=torch.float64)
    resized = resize_table(column.repeat_interleave(7).view(1, 49, 1), (7, 7), (5, 7), "released").view(5, 7)
    for i in range(5):
        at = (i + 0.5) * 7 / 5.1 - 0.5
        taps = range(math.floor(at) - 1, math.floor(at) + 3)
        expected = sum(cubic(abs(at - tap)) * column[min(max(tap, 0), 6)] for tap in taps)
        # Columns repeat one value, so sampling along them changes nothing.
        torch.testing.assert_close(resized[i], expected.expand(7))


def cubic(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4)


def test_released_resize_has_the_wanted_grid():
    """The size is floor(table * (target + 0.1) / table): no rounding may lose a row."""
    for table in (4, 14, 28, 37):
        for target in range(1, 65):
            assert (
                resize_table(torch.zeros(1, table * table, 1), (table, table), (target, 1), "released").shape[1]
                == target
            )


@pytest.mark.parametrize("resize", ["released", "size"])
def test_a_resize_and_its_gradient_are_those_of_interpolation(resize):
    table = torch.randn(1, 12, 5, dtype=torch.float64, requires_grad=True)
    image = table.unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    options = {"size": (5, 2)} if resize == "size" else {"scale_factor": (5.1 / 3, 2.1 / 4)}
    theirs = F.interpolate(image, mode="bicubic", **options).flatten(2).transpose(1, 2)
    ours = resize_table(table, (3, 4), (5, 2), resize)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(result, table, upstream)[0] for result in (ours, theirs)))


class Operations(TorchDispatchMode):
    """Records the names of the operations of a block of code."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


def test_a_step_has_products_only():
    """On a GPU the gradient of an interpolation raises in deterministic mode, and that of a convolution is slow."""
    vit, pixels = small_vit(), torch.randn(2, 3, 16, 24)
    vit(pixels)  # makes the matrix of the resize
    with torch.autocast("cpu", torch.bfloat16), Operations() as step:
        vit(pixels).patches.sum().backward()
    assert not [name for name in step.names if "upsample" in name or "conv" in name or "eye" in name]
    assert [name for name in step.names if name.endswith("mm")]


def test_autocast_does_not_round_resized_positions():
    vit = small_vit()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = vit.positions((2, 3))
    torch.testing.assert_close(under_autocast, vit.positions((2, 3)), rtol=0, atol=0)


def test_fake_tensors_do_not_stay_in_the_matrices_of_real_ones():
    key = ((7, 3), (2, 5), "size", torch.float32, torch.device("cpu"))
    for _ in range(2):
        with FakeTensorMode():
            assert resize_matrix(*key).shape == (10, 21)
        assert type(resize_matrix(*key)) is torch.Tensor
    assert resize_matrix(*key) is resize_matrix(*key)


@pytest.mark.parametrize("output", [{}, {"output_fmt": "NHWC"}])
def test_patches_are_embedded_as_by_timms_convolution(output):
    ours, theirs = (kind(None, (4, 6), 3, 5, **output).double() for kind in (PatchEmbed, layers.PatchEmbed))
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 8, 18, dtype=torch.float64, requires_grad=True)
    outputs = [module(pixels) for module in (ours, theirs)]
    torch.testing.assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    ours, theirs = (
        torch.autograd.grad(output, [pixels, *module.parameters()], upstream)
        for output, module in zip(outputs, (ours, theirs), strict=True)
    )
    torch.testing.assert_close(ours, theirs)


def test_drop_path_rates_grow_linearly_and_the_teacher_has_none():
    rates = [getattr(block.drop_path1, "rate", 0.0) for block in small_vit(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert not any(hasattr(block.drop_path1, "rate") for block in small_vit().blocks)


def test_drop_path_statistics():
    drop = small_vit(drop_path=0.25).blocks[-1].drop_path1
    kept = drop(torch.ones(20000, 2, 3))
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))  # per sample
    values = kept[:, 0, 0].unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert (kept[:, 0, 0] == 0).float().mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 20000) ** 0.5)


def test_drop_path_is_on_in_training_only():
    vit = small_vit(drop_path=0.5)
    pixels = torch.randn(8, 3, 32, 32)
    assert not torch.equal(vit(pixels).patches, vit(pixels).patches)
    vit.eval()
    assert torch.equal(vit(pixels).patches, vit(pixels).patches)


def test_the_released_initialization():
    vit = VisionTransformer(width=192, depth=2, heads=3)
    assert (vit.mask_token == 0).all()
    for tensor in (vit.pos_embed, vit.cls_token, vit.blocks[1].mlp.fc2.weight, vit.blocks[0].attn.qkv.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
    assert all((layer.bias == 0).all() for layer in vit.modules() if isinstance(layer, torch.nn.Linear))
    bound = (3 * 16 * 16) ** -0.5  # the library's default for the convolution
    assert 0.95 * bound < vit.patch_embed.proj.weight.abs().max() <= bound


@pytest.mark.parametrize("class_token", [True, False])
def test_compiles_whole_and_agrees(class_token):
    vit = small_vit(class_token=class_token, depth=2)
    pixels, mask = torch.randn(2, 3, 16, 24), torch.rand(2, 6) < 0.5
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels, mask).patches, vit(pixels, mask).patches)


def test_the_residual_stream_is_contiguous():
    """With other strides every LayerNorm would copy its input."""
    for class_token in (True, False):
        assert small_vit(class_token=class_token).embed(torch.randn(2, 3, 16, 24)).is_contiguous()


def test_autocast_keeps_the_residual_stream_in_fp32():
    vit = small_vit()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = vit(pixels, torch.rand(2, 16) < 0.5)
        assert vit.embed(pixels).dtype == torch.float32
    assert tokens.patches.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vit: vit(torch.zeros(1, 3, 30, 32)), "multiples of the patch size 8, got 30x32"),
        (lambda vit: vit(torch.zeros(1, 3, 0, 32)), "multiples of the patch size 8, got 0x32"),
        (lambda vit: vit(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)), r"shape \(1, 16\)"),
        (lambda vit: vit(torch.zeros(1, 3, 32, 32), torch.zeros(1, 16)), "must be bool"),
        (lambda vit: vit(torch.zeros(1, 3, 32, 32), layers=(3,)), "there are 3 blocks"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_vit())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must divide width, got 5 and 24"),
        ({"drop_path": 1.0}, r"must lie in \[0, 1\), got 1.0"),
        ({"position_resize": "bilinear"}, "got 'bilinear'"),
        ({"image_size": 30}, "multiples of the patch size 8, got 30x30"),
    ],
)
def test_errors_at_build(options, message):
    with pytest.raises(ValueError, match=message):
        small_vit(**options)


def test_weights_of_moco_v3_are_uniform_by_fan_in_and_fan_out():
    vit = small_vit(width=48, start="moco_v3")
    fan_sums = {
        "patch_embed.proj": 3 * 8 * 8 + 48,
        "blocks.1.attn.qkv": 48 + 48,
        "blocks.1.attn.proj": 48 + 48,
        "blocks.2.mlp.fc1": 48 + 192,
    }
    for name, fans in fan_sums.items():
        weight, bound = vit.get_submodule(name).weight, math.sqrt(6 / fans)
        assert bound * 0.99 < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        assert (vit.get_submodule(name).bias == 0).all(), name
    assert 0 < vit.cls_token.std() < 3e-6


@pytest.mark.parametrize("class_token", [True, False])
def test_fixed_positions_have_the_row_first_and_are_not_trained(class_token):
    vit = VisionTransformer(16, 1, 2, 4, image_size=20, class_token=class_token, positions="sincos_rows_first")
    assert not vit.pos_embed.requires_grad
    table = vit.pos_embed[0, int(class_token) :].unflatten(0, (5, 5))
    assert class_token is False or (vit.pos_embed[0, 0] == 0).all()
    for row, column in ((0, 0), (3, 1), (4, 2)):
        expected = [
            function(position / 10000 ** (k / 4))
            for position in (row, column)
            for function in (math.sin, math.cos)
            for k in range(4)
        ]
        torch.testing.assert_close(table[row, column], torch.tensor(expected))


def test_fixed_positions_need_a_multiple_of_four_channels():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        VisionTransformer(6, 1, 2, 4, image_size=8, positions="sincos_rows_first")


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_sizes_together_are_sizes_one_by_one(class_token, drop_path):
    """Outputs and gradients, in float64, with the same dropped paths."""
    torch.manual_seed(0)
    vit = VisionTransformer(24, 3, 2, 4, 16, class_token=class_token, drop_path=drop_path).double()
    crops = [(torch.randn(3, 3, 16, 16).double(), torch.rand(3, 16) < 0.5), (torch.randn(2, 3, 8, 12).double(), None)]
    kept = torch.rand(2, 3, 2, 3) < 0.5 if drop_path else torch.ones(2, 3, 2, 3) > 0
    results = []
    for together in (False, True):
        vit.zero_grad()
        counts = [0, 0]

        def drop(x, counts=counts):
            size = 0 if len(x) == 3 else 1
            block, branch = divmod(counts[size], 2)
            counts[size] += 1
            return x * (kept[size, block, branch, : len(x)].double() / (1 - drop_path))[:, None, None]

        for block in vit.blocks[1:]:
            if drop_path:
                block.drop_path1.forward = block.drop_path2.forward = drop
        tokens = vit.forward_sizes(crops, True) if together else [vit(*crop, residual=True) for crop in crops]
        outputs = [x for t in tokens for x in (t.cls, t.patches, t.residual) if x is not None]
        assert [t.grid for t in tokens] == [(4, 4), (2, 3)]
        sum(x.square().sum() for x in outputs).backward()
        results.append(outputs + [p.grad for p in vit.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
