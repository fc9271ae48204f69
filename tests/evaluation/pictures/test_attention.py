"""Class attention: numbers against timm's own, pictures against their expected pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from patchlight.backbones.vit import VisionTransformer as OurVisionTransformer
from patchlight.backbones.vit import attention_map
from patchlight.evaluation.pictures.attention import class_attention_maps, draw_attention, summary_attention_maps
from patchlight.heads.summary import ClassAttentionSummary
from patchlight.records import Tokens

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}


def probabilities(monkeypatch, run) -> list[torch.Tensor]:
    """The weights of all calls of scaled_dot_product_attention inside `run`."""
    weights, original = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        weights.append((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1))
        return original(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    run()
    monkeypatch.undo()
    return weights


@pytest.mark.parametrize("qk_norm", [False, True])
def test_maps_are_those_of_timms_attention(monkeypatch, qk_norm):
    vit = VisionTransformer(**SIZES, qk_norm=qk_norm).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(2, 3, 16, 16)
    for number, block in enumerate(vit.blocks):
        maps = class_attention_maps(vit, block, pixels)
        with torch.no_grad():
            expected = probabilities(monkeypatch, lambda: vit(pixels))[number][:, :, 0, 1:]
        assert maps.shape == (2, 3, 16)
        assert (maps - expected).abs().max() < 1e-6
        assert expected.std() > 1e-3, "not uniform"


def test_our_backbone_gives_the_same_as_its_own_method():
    vit = OurVisionTransformer(width=24, depth=2, heads=3, patch_size=4, image_size=16)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.allclose(
        class_attention_maps(vit, vit.blocks[-1], pixels), attention_map(vit, pixels)[:, :, 0, 1:], atol=1e-6
    )
    assert not vit.blocks[-1]._forward_pre_hooks, "the hook is gone"


def test_a_run_past_the_block_is_named():
    vit, other = VisionTransformer(**SIZES), VisionTransformer(**SIZES)
    with pytest.raises(ValueError, match="must pass through the block"):
        class_attention_maps(vit, other.blocks[-1], torch.randn(1, 3, 16, 16))


def test_maps_of_a_summary_head_reproduce_its_last_read():
    """The head's update from the values, weighted by the maps, must be what its last block adds."""
    head = ClassAttentionSummary(24, heads=3, depth=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    patches = torch.randn(2, 16, 24)
    maps = summary_attention_maps(head, patches)
    assert maps.shape == (2, 3, 16)
    with torch.no_grad():
        state = head.blocks[0](patches, head.cls_token.flatten(0, 1).expand(2, -1)).unsqueeze(1)
        block = head.blocks[1]
        v = block.v(block.norm1(torch.cat([state, patches], 1))).unflatten(-1, (3, 8))  # [B, 1 + N, heads, E]
        weights = torch.cat([1 - maps.sum(-1, keepdim=True), maps], -1)
        read = state + block.proj(torch.einsum("bhn,bnhe->bhe", weights, v).flatten(1)[:, None])
        expected = head.norm((read + block.mlp(block.norm2(read)))[:, 0])
        summary = head(Tokens(None, patches, (4, 4))).summary
    assert (summary - expected).abs().max() < 1e-5


def test_pictures_are_bright_where_attention_is():
    images = np.full((2, 32, 32, 3), 100, np.uint8)
    attention = torch.full((2, 3, 16), 0.01)
    attention[0, :, 5] = 0.5  # row 1, column 1
    attention[1, 2, 15] = 0.5  # the third head only, last cell
    sheet = np.asarray(draw_attention(images, attention, (4, 4), height=32)).astype(int)
    assert sheet.shape == (2 * 32 + 4, 6 * 32 + 5 * 4, 3)

    def tile(row, column):
        return sheet[row * 36 : row * 36 + 32, column * 36 : column * 36 + 32].sum(-1)

    assert (tile(0, 0) == 300).all(), "the image itself"
    for column in (1, 3, 4, 5):
        cell = tile(0, column)
        assert cell[8:16, 8:16].min() > cell[0:8].max() + 100, column
    assert tile(1, 5)[24:, 24:].min() > tile(1, 5)[:24].max() + 100
    assert tile(1, 3).std() == 0, "a head with equal attention everywhere"
    red, green, blue = sheet[36 + 28, 2 * 36 + 28]
    assert blue > max(red, green) + 50, "the third of three heads is blue"


def test_a_wrong_grid_is_named():
    with pytest.raises(ValueError, match=r"got \(1, 2, 16\) for 1 images and grid \(4, 5\)"):
        draw_attention(np.zeros((1, 8, 8, 3), np.uint8), torch.rand(1, 2, 16), (4, 5))
