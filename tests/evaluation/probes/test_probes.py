"""Linear probes and fine-tuning: parts against independent formulas, whole evaluations against what they must learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.tiny_run import on_processes
from PIL import Image

from patchlight.backbones.vit import DropPath, VisionTransformer
from patchlight.evaluation.encoder import Encoded, Encoder, InputFormat, Level, set_drop_path
from patchlight.evaluation.features import Reading
from patchlight.evaluation.probes.classification import count_correct
from patchlight.evaluation.probes.finetune import Augment, evaluate_classifier, train_classifier
from patchlight.evaluation.probes.finetune_protocols import FinetuneProtocol, SemiProtocol
from patchlight.evaluation.probes.labeled import LabeledData, LabeledImages, choose_labels
from patchlight.evaluation.probes.linear import LinearProtocol, evaluate_linear, probe_features
from patchlight.evaluation.ranks import Ranks, join_ranks
from patchlight.evaluation.training import Batches, cosine_rate, layer_groups, poly_rate
from patchlight.heads.summary import ClassTokenSummary

CPU = Ranks(torch.device("cpu"))
READING = Reading(batch=16, workers=0)


class Stripes:
    """Images of three classes: stripes along rows, along columns, or none, in random colors."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.labels, self.classes = np.arange(count) % 3, ("rows", "columns", "none")
        self.images = random.integers(60, 200, (count, 1, 1, 3)) + np.zeros((1, 16, 16, 1), int)
        wave = np.where(np.arange(16) % 4 < 2, 50, -50)
        self.images[self.labels == 0] += wave[:, None, None]
        self.images[self.labels == 1] += wave[None, :, None]
        self.images = self.images.astype(np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"stripes {index}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


def stripes(train: int = 48, test: int = 30) -> LabeledData:
    parts = [Stripes(train, 0), Stripes(test, 1)]
    return LabeledData(
        "stripes", *(LabeledImages(s, np.arange(len(s)), s.labels, s.classes) for s in parts), whole=True
    )


def small_encoder() -> Encoder:
    torch.manual_seed(0)
    vit = VisionTransformer(width=24, depth=2, heads=2, patch_size=4, image_size=16)
    return Encoder(vit, ClassTokenSummary(), "small", InputFormat(16))


def finetuned(encoder, train, data, protocol, ranks, reading) -> dict[str, float]:
    model = train_classifier(encoder, train, data, protocol, ranks, reading)
    return evaluate_classifier(model, data, protocol, ranks, reading)


def test_probe_features_are_the_last_levels():
    levels = tuple(Level(torch.full((2, 3), float(i)), torch.randn(2, 4, 3)) for i in range(2))
    encoded = Encoded(torch.full((2, 3), 9.0), torch.arange(24.0).view(2, 4, 3), (2, 2), levels)
    features = probe_features(encoded, average_pool=True)
    assert features[0].tolist() == [0, 0, 0, 9, 9, 9, 4.5, 5.5, 6.5]


def test_a_linear_probe_learns_and_the_backbone_does_not():
    encoder, data = small_encoder(), stripes()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    protocol = LinearProtocol(layers=2, average_pool=True, epochs=30, batch=16, rates=(1e-6, 1.0))
    found = evaluate_linear(encoder, data, protocol, CPU, READING)
    assert found["top1"] == found["top1@1"] > 0.9
    assert found["top1@1e-06"] < 0.7, "each classifier has its own rate"
    assert found["top5"] == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert evaluate_linear(encoder, data, protocol, CPU, READING) == found, "equal seeds give equal numbers"
    with pytest.raises(ValueError, match="got 4 of 2"):
        evaluate_linear(encoder, data, LinearProtocol(layers=4), CPU, READING)


def linear_on_a_rank() -> dict:
    with join_ranks("cpu") as mine:
        protocol = LinearProtocol(layers=1, epochs=30, batch=16, rates=(0.3,))
        return evaluate_linear(small_encoder(), stripes(test=31), protocol, mine, READING)


def test_two_ranks_agree_on_a_linear_probe():
    first, second = on_processes(2, linear_on_a_rank)
    assert first == second
    assert (first["top1"] * 31) % 1 == pytest.approx(0, abs=1e-9), "31 test images, none counted twice"
    assert first["top1"] > 0.6


def test_fine_tuning_moves_deep_blocks_less():
    encoder, data = small_encoder(), stripes()
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    plain = {"randaugment": "", "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    protocol = FinetuneProtocol(60, 16, 3e-3, warmup_epochs=1, layer_decay=0.3, drop_path=0.2, **plain)
    found = finetuned(encoder, data.train, data, protocol, CPU, READING)
    assert found["top1"] > 0.9
    moved = {n: (t - before[n]).abs().mean() for n, t in encoder.backbone.state_dict().items()}
    assert moved["blocks.1.attn.qkv.weight"] > 2 * moved["blocks.0.attn.qkv.weight"] > 0
    assert moved["patch_embed.proj.weight"] > 0


def test_the_published_augmentation_runs():
    """RandAugment, erasing, mixup and cutmix on an odd batch too: the numbers stay finite and the network moves."""
    encoder, data = small_encoder(), stripes(train=45)
    before = encoder.backbone.norm.weight.clone()
    found = finetuned(encoder, data.train, data, FinetuneProtocol(1, 15, warmup_epochs=0), CPU, READING)
    assert 0 <= found["top1"] <= 1
    assert torch.isfinite(encoder.backbone.norm.weight).all()
    assert not torch.equal(encoder.backbone.norm.weight, before)


def test_the_strongest_posterization_is_no_error():
    augment = Augment(FinetuneProtocol(randaugment="rand-m10-inc1"), 16, small_encoder())
    (ops,) = [step.ops for step in augment.change.transforms if hasattr(step, "ops")]
    (posterize,) = [op for op in ops if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    picture = np.asarray(posterize(Image.fromarray(np.full((4, 4, 3), 200, np.uint8))))
    assert (picture == 128).all(), "the highest bit is left"


def test_a_semi_supervised_run_starts_from_its_own_protocol():
    data, protocol = stripes(), SemiProtocol()
    assert (protocol.epochs, protocol.batch, protocol.rate, protocol.min_rate) == (1000, 1024, 1e-5, 1e-5)
    few = choose_labels(data.train, 0.1)
    read, original = [], data.train.source.read
    data.train.source.read = lambda index: (read.append(index), original(index))[1]
    finetuned(small_encoder(), few, data, SemiProtocol(epochs=2, warmup_epochs=0, repeats=1), CPU, READING)
    assert sorted(read) == sorted([*few.ids, *few.ids]), "two epochs over the labelled images and no others"
    with pytest.raises(ValueError, match="got 5 of 2"):
        FinetuneProtocol(epochs=2)


def test_layer_groups_have_the_papers_rates():
    vit = small_encoder().backbone
    head = torch.nn.Linear(24, 3)
    groups = layer_groups(vit, head, 0.65, 0.05)
    share = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert share[id(head.weight)] == (1.0, 0.05)
    assert share[id(vit.norm.weight)] == (1.0, 0.0)
    assert share[id(vit.blocks[1].mlp.fc1.weight)] == (0.65, 0.05)
    assert share[id(vit.blocks[0].mlp.fc1.bias)] == (0.65**2, 0.0)
    assert share[id(vit.patch_embed.proj.weight)] == (0.65**3, 0.05)
    assert share[id(vit.pos_embed)] == (0.65**3, 0.0)
    assert len(share) == len(list(vit.parameters())) + 1, "all but the mask token, once"


def test_schedules():
    assert [cosine_rate(s, 10, 1.0, 0.1, 4) for s in (0, 2, 4)] == [0, 0.5, 1]
    assert cosine_rate(7, 10, 1.0, 0.1, 4) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert poly_rate(5, 10, 1.0) == 0.5


def test_batches_are_shared_without_overlap():
    both = [list(Batches(22, 8, 2, Ranks(torch.device("cpu"), r, 2))) for r in range(2)]
    assert len(both[0]) == len(both[1]) == 4
    for epoch in (0, 1):
        seen = [i for r in both for step in r[2 * epoch : 2 * epoch + 2] for i in step]
        assert len(seen) == len(set(seen)) == 16
    assert both[0][0] != both[0][2], "another order in the next epoch"
    assert len(Batches(5, 64, 3, CPU)) == 3, "fewer images than a batch are one batch"
    with pytest.raises(ValueError, match="got batches of 1 for 2 ranks"):
        Batches(1, 8, 1, Ranks(torch.device("cpu"), 0, 2))


def test_right_answers_are_counted():
    logits = F.one_hot(torch.tensor([2, 0, 1, 5]), 8).float() + 0.01 * torch.arange(8.0)
    assert count_correct(logits, torch.tensor([2, 7, 0, 5])).tolist() == [2, 3, 4]
    assert count_correct(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)).tolist()[1:] == [3, 3]


def test_drop_path_rises_with_depth():
    backbone = VisionTransformer(width=24, depth=3, heads=2, patch_size=4, image_size=16)
    set_drop_path(backbone, 0.2)
    assert isinstance(backbone.blocks[0].drop_path1, torch.nn.Identity)
    assert [b.drop_path2.rate for b in backbone.blocks[1:]] == [0.1, 0.2]
    assert isinstance(backbone.blocks[2].drop_path1, DropPath)
