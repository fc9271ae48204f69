"""The projection head's shapes, initialization and shared parts."""

import copy

import pytest
import torch

from patchlight.heads.projection import ProjectionHead
from patchlight.heads.prototypes import Prototypes


def small_head(**options) -> ProjectionHead:
    return ProjectionHead(**{"in_dim": 12, "bottleneck": 6, "hidden": 10, "prototypes": Prototypes(6, 20), **options})


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 3, 4, 12), (0, 12)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_unit_rows_of_any_shape(shape, layers):
    z = small_head(layers=layers)(torch.randn(shape))
    assert z.shape == (*shape[:-1], 6)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(shape[:-1]))


@pytest.mark.parametrize("hidden_norm", [None, "batch", "layer"])
def test_leading_dimensions_are_rows(hidden_norm):
    head, x = small_head(hidden_norm=hidden_norm), torch.randn(2, 3, 12)
    torch.testing.assert_close(head(x).flatten(0, 1), head(x.flatten(0, 1)))


def test_patches_share_prototypes_unless_they_have_their_own():
    shared, separate = small_head(), small_head(patch_prototypes=Prototypes(6, 30))
    assert shared.patch_prototypes is shared.prototypes
    assert separate.patch_prototypes.count == 30
    assert copy.deepcopy(shared).patch_prototypes.count == 20
    copied = copy.deepcopy(shared)
    assert copied.patch_prototypes is copied.prototypes
    assert copied.prototypes is not shared.prototypes
    same = Prototypes(6, 20)
    assert (
        sum(name.startswith("own_patch") for name in small_head(prototypes=same, patch_prototypes=same).state_dict())
        == 0
    )
    assert sum(name.startswith("own_patch") for name in separate.state_dict()) == 2


def test_layer_norm_is_shared_and_batch_norm_is_not():
    head = small_head(hidden_norm="layer")
    norms = {id(module) for module in head.mlp if isinstance(module, torch.nn.LayerNorm)}
    assert len(norms) == 1
    batch_norms = {
        id(module) for module in small_head(hidden_norm="batch").mlp if isinstance(module, torch.nn.BatchNorm1d)
    }
    assert len(batch_norms) == 2


def test_activations():
    assert sum(isinstance(module, torch.nn.GELU) for module in small_head().mlp) == 2
    assert sum(isinstance(module, torch.nn.ReLU) for module in small_head(activation="relu").mlp) == 2
    with pytest.raises(ValueError, match="activation must be one of"):
        small_head(activation="silu")


def test_the_released_initialization():
    head = small_head(in_dim=200, hidden=300)
    for layer in (module for module in head.mlp if isinstance(module, torch.nn.Linear)):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (layer.bias == 0).all()
    assert (head.prototypes.weight_g == 1).all()
    assert head.prototypes.weight_v.abs().max() <= 6**-0.5


def test_autocast_normalizes_in_fp32():
    head, x = small_head(), torch.randn(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "at least 1, got 0"),
        ({"hidden_norm": "group"}, "must be one of batch, layer, got 'group'; pick"),
        ({"bottleneck": 8}, r"as wide as the bottleneck, 8, got 6; build them with Prototypes\(8, count\)"),
        ({"patch_prototypes": Prototypes(5, 20)}, "as wide as the bottleneck, 6, got 5"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        small_head(**options)
