"""The contrastive head against its layers applied view by view."""

import copy

import pytest
import torch
from torch import nn

from patchlight.heads.contrast import ContrastHead


@pytest.mark.parametrize(("bias", "last_norm"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_view_is_a_batch_of_its_own_in_order(layers, bias, last_norm):
    head = ContrastHead(7, 12, 5, layers, bias=bias, last_norm=last_norm).double()
    copied, x = copy.deepcopy(head), torch.randn(3, 4, 7, dtype=torch.float64) * 3 + 1
    by_view = torch.stack([copied.mlp(view) for view in x])
    torch.testing.assert_close(head(x), by_view, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(head.buffers(), copied.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    kinds = [type(module) for module in head.mlp]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [nn.Linear] + [nn.BatchNorm1d] * last_norm
    assert all((layer.bias is not None) == bias for layer in head.mlp if isinstance(layer, nn.Linear))
    if last_norm:
        assert not head.mlp[-1].affine


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0; 2 is usual"):
        ContrastHead(7, layers=0, bias=True, last_norm=False)
