"""Segmentation on two processes: BatchNorm sees the images of both, and both end with the same network."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine.tiny_run import on_processes
from parity import SEED
from torch import nn

from patchlight.backbones.vit import VisionTransformer
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.features import Reading
from patchlight.evaluation.norms import SharedNorm, average_statistics, share_norms
from patchlight.evaluation.ranks import Ranks
from patchlight.evaluation.segment import benchmark
from patchlight.evaluation.segment.model import Segmenter, segmentation_loss
from patchlight.evaluation.segment.protocols import UperNetSegment
from patchlight.evaluation.segment.scenes import IGNORE, open_scenes
from patchlight.evaluation.segment.windows import predict
from patchlight.evaluation.training import average_gradients
from patchlight.heads.summary import ClassTokenSummary

CPU = torch.device("cpu")
PROTOCOL = UperNetSegment(
    steps=2, warmup=0, batch=4, crop=16, test_short_side=16, stride=16, colors="none", channels=4, helper_channels=4
)


def build(dtype: torch.dtype) -> Segmenter:
    torch.manual_seed(SEED)
    vit = VisionTransformer(width=16, depth=4, heads=2, patch_size=4, image_size=16)
    encoder = Encoder(vit, ClassTokenSummary(), "small", InputFormat(16))
    model = Segmenter(encoder, PROTOCOL.build_head(encoder, 3), PROTOCOL.features)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model.to(dtype).train()


def one_step(rank: int, world: int) -> dict:
    """Gradients and buffers after one pass over this rank's part of four images, in fp64. Known pixels differ in number."""
    ranks = Ranks(CPU, rank, world)
    model = build(torch.float64)
    share_norms(model, ranks)
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (4, 16, 16), generator=generator)
    classes[0, :9] = IGNORE
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    segmentation_loss(model(pixels[mine]), classes[mine], ranks).backward()
    average_gradients(model, ranks)
    kept = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return kept | {name: b.numpy() for name, b in model.named_buffers()}


def in_a_process() -> tuple[dict, dict, np.ndarray, list]:
    """One step; then a whole evaluation: the network and what it predicts; and averaged norms of another class."""
    dist.init_process_group("gloo")
    try:
        ranks = Ranks(CPU, dist.get_rank(), dist.get_world_size())
        step = one_step(ranks.rank, ranks.world)
        models, test = [], benchmark._test
        benchmark._test = lambda model, *others: models.append(model) or test(model, *others)
        scenes = open_scenes("procedural", procedural_images=8)
        benchmark.evaluate_segment(build(torch.float32).encoder, scenes, PROTOCOL, ranks, Reading(workers=0))
        state = {name: tensor.numpy() for name, tensor in models[0].state_dict().items()}
        predicted = predict(models[0], scenes.test.read(0).image, PROTOCOL, CPU, "fp32")
        other = nn.BatchNorm1d(2)
        other.running_mean += ranks.rank
        average_statistics(other, ranks)
        return step, state, predicted, other.running_mean.tolist()
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch():
    (first, *first_end), (second, *second_end) = on_processes(2, in_a_process)
    expected = one_step(0, 1)
    assert first.keys() == expected.keys()
    assert any("running_var" in name for name in first)
    for name, value in expected.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert any("running_mean" in name for name in first_end[0])
    for name, value in first_end[0].items():
        np.testing.assert_array_equal(value, second_end[0][name], err_msg=name)
    np.testing.assert_array_equal(first_end[1], second_end[1])
    assert first_end[2] == second_end[2] == [0.5, 0.5]


def test_norms_stay_as_they_are_on_one_process():
    model = build(torch.float32)
    share_norms(model, Ranks(CPU))
    assert not [m for m in model.modules() if isinstance(m, SharedNorm)]
    assert [m for m in model.modules() if type(m) is nn.BatchNorm2d]


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (4, 3, 1, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_shared_norm_of_one_process_is_torchs(tmp_path, shape, affine):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(SEED)
        plain, shared = (nn.BatchNorm2d(3, affine=affine, dtype=torch.float64) for _ in range(2))
        shared.__class__ = SharedNorm
        for _ in range(2):
            x = torch.randn(shape, dtype=torch.float64).add(3).requires_grad_()
            weight = torch.randn(shape, dtype=torch.float64)
            (wanted,) = torch.autograd.grad((plain(x) * weight).sum(), x)
            (found,) = torch.autograd.grad((shared(x) * weight).sum(), x)
            torch.testing.assert_close(found, wanted)
        assert all(torch.allclose(a, b) for a, b in zip(plain.buffers(), shared.buffers(), strict=True))
        torch.testing.assert_close(plain.eval()(x), shared.eval()(x))
    finally:
        dist.destroy_process_group()
