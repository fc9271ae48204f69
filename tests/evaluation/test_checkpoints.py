"""Checkpoints of every kind give the features of the network in them, or an error that names what is wrong."""

import argparse

import numpy as np
import pytest
import timm
import torch
from engine.tiny_run import DINO, SELFPATCH, on_processes, tiny_run, tiny_trainer
from safetensors.torch import save_file

from patchlight.data.procedural import ProceduralSource
from patchlight.evaluation.checkpoints import open_checkpoint, run_folder_of
from patchlight.evaluation.features import Reading, encode
from patchlight.evaluation.images import Unreadable
from patchlight.evaluation.probes.knn import KnnProtocol, accuracies, evaluate_knn, nearest_training_images
from patchlight.evaluation.probes.labeled import open_labeled
from patchlight.evaluation.ranks import Ranks, join_ranks
from patchlight.records import Crops, Views

CPU = Ranks(torch.device("cpu"))
KS = (1, 9)
SIZES = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


def timm_vit(std: float = 0.1):
    vit = timm.models.vision_transformer.VisionTransformer(**SIZES).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return vit


LAYOUTS = {
    "plain.pth": lambda w: w,
    "dino_full.pth": lambda w: {
        "teacher": {f"backbone.{n}": t for n, t in w.items()} | {"head.mlp.0.weight": torch.ones(2, 2)},
        "student": {f"module.backbone.{n}": t + 1 for n, t in w.items()},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 3,
    },
    "wrapped.pth": lambda w: {"state_dict": {f"module.base_encoder.{n}": t for n, t in w.items()}},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "timm.safetensors"])
def test_official_layouts_give_timms_features(layout, tmp_path):
    vit, path = timm_vit(), tmp_path / layout
    if path.suffix == ".pth":
        torch.save(LAYOUTS[layout](vit.state_dict()), path)
    else:
        save_file(vit.state_dict(), path)
    encoder = open_checkpoint(str(path), heads=2)
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        encoded, expected = encoder(pixels, layers=(0, -1)), vit.forward_features(pixels)
        first = vit.forward_intermediates(pixels, indices=[0], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    assert (encoded.summary - expected[:, 0]).abs().max() < 1e-5
    assert (encoded.patches - expected[:, 1:]).abs().max() < 1e-5
    assert (encoded.levels[0].patches - first).abs().max() < 1e-5
    assert torch.equal(encoded.levels[1].summary, encoded.summary)


def test_timm_models_by_name_keep_their_own_input_format(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: make(name, pretrained=False, **kw))
    encoder = open_checkpoint("vit_tiny_patch16_224")
    assert (encoder.patch_size, encoder.width, encoder.depth) == (16, 192, 12)
    assert encoder.input_format.mean == (0.5, 0.5, 0.5), "as its own pretraining had it"
    pixels = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        encoded = encoder(pixels, layers=(3, -1))
        expected = encoder.backbone.model.forward_features(pixels)
    assert encoded.grid == (2, 3)
    assert torch.equal(encoded.patches, expected[:, 1:])
    assert torch.equal(encoded.summary, expected[:, 0])
    assert torch.equal(encoded.levels[1].patches, encoded.patches)
    resnet = open_checkpoint("resnet18")
    with torch.no_grad():
        encoded = resnet(torch.randn(2, 3, 64, 64))
    assert encoded.grid == (2, 2)
    assert (encoded.summary - encoded.patches.mean(1)).abs().max() < 1e-6


make = timm.create_model


@pytest.mark.parametrize("options", [(DINO,), (SELFPATCH,)], ids=["class token", "class attention"])
def test_a_run_folder_gives_the_teachers_own_features(options, tmp_path):
    run = tiny_run(tmp_path / "run", options=options, optim={"teacher_momentum": 0.5})
    trainer = tiny_trainer(run)
    for _ in range(2):
        trainer.step()
    trainer.save()
    (tmp_path / "run" / "run.json").write_text("{}")
    pixels = torch.randn(2, 3, 16, 16)
    crops = Crops(pixels[None], torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool))
    with torch.no_grad():
        expected = trainer.teacher.eval()(Views(crops, None, None, torch.arange(2))).global_crops
        encoded = open_checkpoint(str(tmp_path / "run"))(pixels)
        step = trainer.checkpoints.all()[-1]
        exported = open_checkpoint(str(step / "teacher.safetensors"))
        alone = exported(pixels)
    assert torch.equal(encoded.patches, expected.patches[0])
    assert torch.equal(encoded.summary, expected.summary[0])
    assert torch.equal(alone.patches, expected.patches[0])
    assert bool(exported.notes) == (SELFPATCH in options), "a note names the missing summary head"
    assert exported.input_format.image_size == 16
    assert run_folder_of(str(step / "teacher.safetensors")) == tmp_path / "run"


def test_what_is_no_backbone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder, a file or the name"):
        open_checkpoint("vit_of_nobody")
    torch.save({"optimizer": {"state": torch.ones(3)}, "head.weight": torch.ones(2)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"must hold a ViT, Swin or ResNet backbone .* got 2 tensors"):
        open_checkpoint(str(tmp_path / "head.pth"))
    weights = timm_vit().state_dict()
    torch.save(weights, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="width 32, which 64 does not divide"):
        open_checkpoint(str(tmp_path / "narrow.pth"))
    torch.save({"patch_embed.proj.weight": torch.ones(8, 3, 4, 4)}, tmp_path / "stem.pth")
    with pytest.raises(ValueError, match="got 0 blocks, no table"):
        open_checkpoint(str(tmp_path / "stem.pth"))
    del weights["blocks.1.mlp.fc2.weight"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"1 tensors missing.*blocks.1.mlp.fc2.weight"):
        open_checkpoint(str(tmp_path / "cut.pth"), heads=2)
    with pytest.raises(FileNotFoundError, match="complete checkpoint"):
        open_checkpoint(str(tmp_path))


def knn_on_a_rank(path: str) -> tuple[np.ndarray, np.ndarray, dict[int, float]]:
    """Similarities and labels of the nearest, and accuracies; as arrays, which travel between processes."""
    with join_ranks("cpu") as mine:
        data = open_labeled("procedural", 45)
        nearest, _ = nearest_training_images(open_checkpoint(path, heads=2), data, 10, mine, Reading(8, workers=0))
        found = accuracies(nearest, torch.from_numpy(data.test.labels), KS, KnnProtocol.temperature, data.class_count)
        return nearest.similarity.numpy(), nearest.label.numpy(), found


def test_two_ranks_find_the_neighbors_that_one_finds(tmp_path):
    """Rounding decides which of two equally similar images is the neighbor: similarities agree, and labels where they are clear.

    An image's features depend on the batch that it is in by rounding, and ranks make other batches.
    """
    torch.save(timm_vit(std=0.6).state_dict(), tmp_path / "vit.pth")  # so that images differ by far more than rounding
    similarity, label, accuracy = knn_on_a_rank(str(tmp_path / "vit.pth"))
    assert len(set(accuracy.values())) == 2
    given = open_checkpoint(str(tmp_path / "vit.pth"), heads=2), open_labeled("procedural", 45), KnnProtocol(k=KS)
    assert evaluate_knn(*given, CPU, Reading(8, workers=0)) == {f"k{k}": value for k, value in accuracy.items()}
    rounding = 3e-6
    clear = np.ones_like(label, dtype=bool)  # no other image is as similar
    closer = similarity[:, :-1] - similarity[:, 1:] > 2 * rounding
    clear[:, 1:] &= closer
    clear[:, :-1] &= closer
    clear[:, -1] = False  # the next one is not known
    assert clear.mean() > 0.8, "too few neighbors differ clearly from the next"
    on_ranks = on_processes(2, knn_on_a_rank, str(tmp_path / "vit.pth"))
    unsure = (~clear[:, :9]).any(axis=1).mean()
    for found, names, shares in on_ranks:
        assert abs(found - similarity).max() <= rounding
        assert np.array_equal(names[clear], label[clear])
        assert shares == on_ranks[0][2], "all ranks give the same"
        assert all(abs(shares[k] - accuracy[k]) <= unsure for k in KS)


def encoded_on_a_rank(path: str) -> np.ndarray:
    with join_ranks("cpu") as mine:
        encoder, source = open_checkpoint(path, heads=2), ProceduralSource(11, 32)
        summaries, numbers = encode(encoder, source, mine, Reading(4, workers=0), 24, 24, Unreadable())
        assert numbers.tolist() == list(range(11))
        return summaries.numpy()


def test_ranks_share_the_images_without_a_duplicate(tmp_path):
    torch.save(timm_vit().state_dict(), tmp_path / "vit.pth")
    encoder, source = open_checkpoint(str(tmp_path / "vit.pth"), heads=2), ProceduralSource(11, 32)
    alone, _ = encode(encoder, source, CPU, Reading(3, workers=0), 24, 24, Unreadable())
    assert len(np.unique(alone.numpy().round(4), axis=0)) == 11, "every image has its own features"
    for shared in on_processes(2, encoded_on_a_rank, str(tmp_path / "vit.pth")):
        assert abs(shared - alone.numpy()).max() < 1e-5


def test_damaged_facts_beside_weights_are_named(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_file(timm_vit().state_dict(), path)
    for content in ("", "[]", "{}", '{"run": {"model": 3}}', '{"run": nul'):
        (tmp_path / "facts.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"facts.json beside weights must describe their run, got .* in .*facts.json"
        ):
            open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("patch_embed.proj.weight", torch.ones(3), r"2 blocks, \(1, 10, 32\) table and patches \(3,\)"),
        ("pos_embed", torch.ones(0, 0, 0), r"\(0, 0, 0\) table"),
        ("pos_embed", torch.ones(7), r"\(7,\) table"),
        ("blocks.0.attn.qkv.weight", torch.ones(32, 96), "1 of another size .* blocks.0.attn.qkv.weight"),
        ("reg_token", torch.ones(1, 4, 32), r"got register tokens \(reg_token\)"),
        ("neck.bias", torch.ones(4), r"1 unknown .* neck.bias"),
        ("norm.bias", torch.full((32,), torch.inf), "got 32 of 32 values of norm.bias"),
    ],
)
def test_a_vit_that_cannot_be_opened_is_named(name, tensor, sentence, tmp_path):
    torch.save({**timm_vit().state_dict(), name: tensor}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=sentence):
        open_checkpoint(str(tmp_path / "vit.pth"), heads=2)
