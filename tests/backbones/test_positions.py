"""Fixed positions against the formulas written out, and as a backbone's table."""

import math

import pytest
import torch

from patchlight.backbones.positions import EMBEDDINGS, grid_positions, sincos, sincos_printed
from patchlight.backbones.vit import VisionTransformer


def mae_by_hand(x: float, y: float, width: int) -> list[float]:
    quarter = width // 4
    w = [1 / 10000 ** (k / quarter) for k in range(quarter)]
    return [f(v * frequency) for v in (x, y) for f in (math.sin, math.cos) for frequency in w]


def printed_by_hand(x: float, y: float, width: int) -> list[float]:
    functions = (math.sin, math.cos)
    return [functions[(i - 1) % 2](v / 10000 ** (2 * i / width)) for v in (x, y) for i in range(1, width // 2 + 1)]


@pytest.mark.parametrize(("embed", "by_hand"), [(sincos, mae_by_hand), (sincos_printed, printed_by_hand)])
@pytest.mark.parametrize("width", [4, 12, 32])
def test_any_position_has_an_embedding(embed, by_hand, width):
    positions = torch.tensor([[0, 0], [3, 7], [-2.25, 19.5], [13.7, -8.1]], dtype=torch.float64)
    expected = torch.tensor([by_hand(x, y, width) for x, y in positions.tolist()], dtype=torch.float64)
    torch.testing.assert_close(embed(positions, width), expected, rtol=0, atol=1e-13)
    assert (embed(positions.float(), width) - expected).abs().max() < 4e-6


def test_low_precision_positions_are_embedded_in_fp32():
    positions = torch.tensor([[6.5, -3.0]], dtype=torch.bfloat16)
    assert torch.equal(sincos(positions, 8), sincos(positions.float(), 8))


def test_x_is_the_column():
    assert grid_positions((2, 3)).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("kind", sorted(EMBEDDINGS))
@pytest.mark.parametrize("class_token", [True, False])
def test_the_table_is_fixed_and_kept_in_checkpoints(kind, class_token):
    vit = VisionTransformer(8, 1, 2, patch_size=4, image_size=12, class_token=class_token, positions=kind)
    assert "pos_embed" not in dict(vit.named_parameters())
    table = vit.state_dict()["pos_embed"][0]
    if class_token:
        assert not table[0].any()
        table = table[1:]
    torch.testing.assert_close(table[5].double(), EMBEDDINGS[kind](torch.tensor([2.0, 1.0]).double(), 8))


def test_a_width_without_four_parts_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of 4, got 6"):
        VisionTransformer(6, 1, 2, positions="sincos")
    with pytest.raises(ValueError, match=r"positions must be one of learned, .*got 'rotary'; pick"):
        VisionTransformer(8, 1, 2, positions="rotary")
