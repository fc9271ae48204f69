"""SERE's heads against their formulas in float64."""

import torch

from patchlight.heads.relation import RelationFeatures, RelationHead, RelationPrediction, RelationPredictor

D = 6


def normalized(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """ReLU(BN(x)) over all rows, by hand."""
    rows = x.reshape(-1, x.shape[-1])
    mean, variance = rows.mean(dim=0), rows.var(dim=0, unbiased=False)
    return ((x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias).relu()


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with random parameters."""
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_projection_and_prediction_are_their_formulas_over_all_crops_at_once():
    x = 3 + 2 * torch.randn(2, 3, 5, D, dtype=torch.float64)
    head, prediction = drawn(RelationHead(D)), drawn(RelationPrediction(D))
    projected = head(x)
    predicted = prediction(projected)
    for kind in ("spatial", "channel"):
        h, p = getattr(projected, kind), getattr(predicted, kind)
        torch.testing.assert_close(h, normalized(x, getattr(head, kind)[0]))
        linear, norm, _ = getattr(prediction, kind)
        assert linear.bias is None
        torch.testing.assert_close(p, normalized(h @ linear.weight.T, norm))
    assert not torch.equal(projected.spatial, projected.channel)


def test_local_crops_have_weights_and_statistics_of_their_own():
    predictor = drawn(RelationPredictor(D, asymmetric=True, local=True))
    features, patches = torch.randn(2, 2, 3, 5, D, dtype=torch.float64)
    projected = RelationFeatures(features, features)
    outputs = predictor(projected, patches)
    torch.testing.assert_close(
        outputs.local_crops.spatial, predictor.local_prediction(predictor.local_head(patches)).spatial
    )
    torch.testing.assert_close(outputs.global_crops.channel, predictor.prediction(projected).channel)
    assert predictor(projected, None).local_crops is None


def test_a_symmetric_predictor_leaves_global_crops_as_they_are_and_projects_local_ones():
    predictor = drawn(RelationPredictor(D, asymmetric=False, local=True))
    features, patches = torch.randn(2, 2, 3, 5, D, dtype=torch.float64)
    projected = RelationFeatures(features, features)
    outputs = predictor(projected, patches)
    assert outputs.global_crops is projected
    torch.testing.assert_close(outputs.local_crops.spatial, normalized(patches, predictor.local_head.spatial[0]))
