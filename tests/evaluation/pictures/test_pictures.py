"""Attention of query patches, similarities, main directions and self-relations: numbers against independent forms."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation.pictures.test_attention import SIZES, probabilities
from timm.models.vision_transformer import VisionTransformer

from patchlight.backbones.vit import VisionTransformer as OurVisionTransformer
from patchlight.data.procedural import ProceduralSource
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.pictures.attention import (
    class_attention_maps,
    query_attention_maps,
    summary_attention_maps,
)
from patchlight.evaluation.pictures.page import write_page
from patchlight.evaluation.pictures.patch_features import (
    PictureProtocol,
    attention_maps,
    draw_pictures,
    draw_queries,
    principal_components,
    similarities,
    top_patches,
)
from patchlight.evaluation.pictures.relations import (
    RelationProtocol,
    channel_relations,
    common_points,
    evaluate_relations,
    spatial_relations,
)
from patchlight.evaluation.ranks import Ranks
from patchlight.heads.summary import ClassAttentionSummary, ClassTokenSummary, MeanSummary

CPU = Ranks(torch.device("cpu"))


def test_query_maps_are_those_of_timms_attention(monkeypatch):
    vit = VisionTransformer(**SIZES, reg_tokens=2).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels, patches = torch.randn(2, 3, 16, 16), torch.tensor([0, 5, 15])
    maps = query_attention_maps(vit, vit.blocks[-1], pixels, patches, prefix=3)
    with torch.no_grad():
        expected = probabilities(monkeypatch, lambda: vit(pixels))[-1][:, :, 3 + patches, 3:]
    assert maps.shape == (2, 3, 3, 16)
    assert (maps - expected).abs().max() < 1e-6


def test_attention_is_that_of_the_summary():
    """Of the class token in the last block; of class attention where there is no class token; a mean has none."""
    pixels, size = torch.randn(2, 3, 16, 16), {"width": 24, "depth": 2, "heads": 3, "patch_size": 4, "image_size": 16}
    vit, plain = OurVisionTransformer(**size), OurVisionTransformer(**size, class_token=False)
    encode = lambda backbone, summary: Encoder(backbone, summary, "small", InputFormat(16)).eval()
    found = attention_maps(encode(vit, ClassTokenSummary()), pixels)
    assert torch.equal(found, class_attention_maps(vit, vit.blocks[-1], pixels))
    head = ClassAttentionSummary(24, heads=3)
    found = attention_maps(encode(plain, head), pixels)
    assert torch.equal(found, summary_attention_maps(head, plain(pixels).patches))
    assert found.shape == (2, 3, 16)
    with pytest.raises(ValueError, match="got the mean of the patches in small; draw similarities"):
        attention_maps(encode(plain, MeanSummary()), pixels)


def test_top_patches_are_as_many_as_the_share():
    maps = torch.randn(2, 3, 196)
    mask = top_patches(maps, 0.1)
    assert (mask.sum(-1) == 20).all()
    assert maps[mask].view(2, 3, 20).amin(-1).gt(maps.masked_fill(mask, -9).amax(-1)).all()
    assert top_patches(torch.randn(4), 0.01).sum() == 1


def test_similarities_are_cosines():
    patches, numbers = torch.randn(2, 9, 5), torch.tensor([0, 4])
    expected = F.cosine_similarity(patches[:, numbers, None], patches[:, None], dim=-1)
    assert (similarities(patches, numbers) - expected).abs().max() < 1e-6


def test_main_directions_are_found():
    """Patches that differ along one hidden direction: the first component orders them."""
    hidden = torch.linspace(0, 1, 50).repeat(2, 1)
    patches = hidden[..., None] * torch.randn(8) * 5 + 0.05 * torch.randn(2, 50, 8) + 7
    first = principal_components(patches)[..., 0]
    assert abs(np.corrcoef(first.flatten().numpy(), hidden.flatten().numpy())[0, 1]) > 0.99
    assert principal_components(patches).min() == 0
    assert principal_components(patches).max() == 1


def test_patches_of_high_attention_are_bright():
    images = np.full((1, 32, 32, 3), 200, np.uint8)
    attention = torch.zeros(1, 1, 16)
    attention[0, 0, [2, 3]] = 1.0
    sheet = np.asarray(draw_queries(images, attention, torch.tensor([12]), (4, 4), 2 / 16)).astype(int)
    bright = sheet[:, 160 + 4 :].mean(-1)
    assert (bright[:40, 80:] == 200).all()
    assert (bright[40:115] < 60).all()
    assert np.abs(sheet[121:159, 164 + 1] - [255, 59, 48]).max() == 0, "the query's frame"


@pytest.mark.parametrize("whole", [True, False])
def test_all_sheets_of_a_backbone(whole, tmp_path):
    vit = OurVisionTransformer(width=24, depth=2, heads=2, patch_size=4, image_size=16)
    encoder = Encoder(vit, ClassTokenSummary(), "small", InputFormat(16)).eval()
    drawn = draw_pictures(encoder, ProceduralSource(9, 24), PictureProtocol(images=3), CPU.device, whole)
    sheets = drawn.sheets
    assert drawn.notes == ()
    assert set(sheets) == {"class attention", "query attention", "similarity", "principal components"}
    for name, sheet in sheets.items():
        sheet.save(tmp_path / f"{name}.png")
    page = write_page(tmp_path, "a < b", [(n, "words", tmp_path / f"{n}.png") for n in sheets]).read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "a &lt; b" in page
    with pytest.raises(ValueError, match="must lie in"):
        PictureProtocol(queries=((1.0, 0.5),))


def test_common_points_are_the_same_places_of_the_source():
    """Sampling an image of coordinates at the points gives equal coordinates from both views."""
    boxes = torch.tensor([[[10.0, 20, 100, 60]], [[50.0, 10, 80, 120]]])
    flips = torch.tensor([[False], [True]])
    grids, shared = common_points(boxes, flips, 5)
    assert shared.tolist() == [True]
    places = []
    for view in range(2):
        x, y, w, h = boxes[view, 0].tolist()
        u, v = ((grids[view, 0] + 1) / 2).unbind(-1)
        u = 1 - u if flips[view, 0] else u
        places.append(torch.stack([x + u * w, y + v * h], -1))
    assert (places[0] - places[1]).abs().max() < 1e-4
    assert places[0].amin((0, 1)).tolist() == pytest.approx([56, 26], abs=1e-3), "centers of cells of 50..110 x 20..80"
    assert not common_points(boxes * torch.tensor([1.0, 1, 0.1, 1]), flips, 5)[1].item()


def test_relations_by_hand():
    patches = torch.randn(1, 12, 6)
    steps = (torch.arange(4) + 0.5) / 4 * 2 - 1
    rows = (torch.arange(3) + 0.5) / 3 * 2 - 1
    grid = torch.stack(torch.meshgrid(steps, rows, indexing="xy"), -1)[None]  # the patches' own centers
    heads = spatial_relations(patches, (3, 4), grid, 2)
    for head in range(2):
        part = patches[0, :, 3 * head : 3 * head + 3]
        assert (heads[0, head] - F.cosine_similarity(part[:, None], part, dim=-1)).abs().max() < 1e-5
    channel = F.cosine_similarity(patches[0].T[:, None], patches[0].T, dim=-1)
    assert (channel_relations(patches)[0] - channel).abs().max() < 1e-5


class MeanColors(torch.nn.Module):
    """A backbone whose features are the mean color of a patch, so that mirroring alone changes no relation."""

    width, patch_size, heads, has_class_token, returns_blocks, blocks = 3, 4, 1, False, False, (None,)

    def forward(self, pixels, layers=()):
        from patchlight.records import Tokens

        maps = F.avg_pool2d(pixels, 4)
        return Tokens(None, maps.flatten(2).transpose(1, 2), tuple(maps.shape[-2:]))


def test_relation_differences_are_measured_over_all_pairs():
    encoder = Encoder(MeanColors(), MeanSummary(), "colors", InputFormat(32))
    found = evaluate_relations(encoder, ProceduralSource(20, 48), RelationProtocol(images=20, heads=1), CPU, batch=5)
    assert 0 < found.metrics["spatial difference"] < 1
    assert 0 < found.metrics["channel difference"] < 1
    assert found.sheet.size == (5 * 160 + 16, 4 * 160 + 12)
    json.dumps(found.metrics)
    with pytest.raises(ValueError, match="got 6 and 3"):
        evaluate_relations(encoder, ProceduralSource(20, 48), RelationProtocol(heads=6), CPU)
