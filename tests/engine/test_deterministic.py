"""A deterministic run on a GPU: no step uses an operation that `torch.use_deterministic_algorithms` refuses there."""

import re

import pytest
import torch
from dispatched import dispatched
from engine.tiny_run import COMBINATIONS, tiny_run, tiny_trainer

# As its documentation lists them, for a GPU; a `cumsum` of integers and an `nll_loss` of rows are not among them.
REFUSED = re.compile(
    r"aten::(upsample_\w+_backward|_upsample_\w+_backward|adaptive_\w+_pool\w+_backward|avg_pool3d_backward|"
    r"max_pool3d\w+_backward|max_unpool\w+|fractional_max_pool\w+_backward|grid_sampler_\w+_backward|"
    r"(reflection|replication)_pad\w+_backward|put_?\b|histc|bincount|kthvalue|median|scatter_reduce|nll_loss2d\w*|"
    r"_ctc_loss\w*|_embedding_bag\w*|resize_)"
)


@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_no_operation_of_a_step_is_refused_on_a_gpu(options, tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path, options=options))
    trainer.step()
    _, counter = dispatched(trainer.device_step, [next(trainer.loader)])
    assert len(counter.names) > 100
    assert not [name for name in counter.names if REFUSED.match(name)]


def test_the_gradient_of_an_interpolation_would_be_seen():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    resized = torch.nn.functional.interpolate(x, size=(3, 3), mode="bicubic")
    _, counter = dispatched(resized.sum().backward)
    assert [name for name in counter.names if REFUSED.match(name)]
