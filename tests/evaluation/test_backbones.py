"""Every command takes Swin and ResNet from every kind of checkpoint, as it takes a ViT."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from engine.test_pairing import RESNET, SWIN, run_on
from engine.tiny_run import DINO, tiny_trainer
from PIL import Image

from patchlight.data.procedural_video import write_davis
from patchlight.evaluation.__main__ import main
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.evaluation.probes.linear import LinearProtocol, published_linear
from patchlight.evaluation.pyramid import Pyramid
from patchlight.evaluation.results import changed_fields

VIT = "random:vit_tiny,width=24,depth=2,heads=2,patch_size=8,image_size=32"
create = timm.create_model
SMALL = {  # of timm's models, so that a test takes no second
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "window_size": 2,
        "num_heads": (1, 2, 4, 8),
    },
    "resnet18": {"channels": (8, 16, 32, 64)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """By name: runs of this library, their exported teachers, files of weights alone, random starts."""
    folder = tmp_path_factory.mktemp("runs")
    models = {"swin": SWIN, "resnet": RESNET, "swin, class attention": {**SWIN, "summary": "class_attention"}}
    found = {"vit at random": VIT, "resnet at random": "random:resnet18,stem_width=4,image_size=64"}
    for name, model in models.items():
        run = run_on(model, DINO, output={"folder": str(folder / name)})
        trainer = tiny_trainer(run)
        trainer.save()
        (folder / name / "run.json").write_text(json.dumps(trainer.run.to_dict()))
        found[f"{name}, run"] = str(folder / name)
        found[f"{name}, teacher"] = str(trainer.checkpoints.all()[-1] / "teacher.safetensors")
    for name in ("swin_tiny_patch4_window7_224", "resnet18"):
        sizes = {**SMALL[name], **({"depths": (2, 2, 1, 2)} if "swin" in name else {})}
        torch.save({"model": create(name, **sizes).state_dict()}, folder / f"{name}.pth")
        found[f"{name}, file"] = str(folder / f"{name}.pth")
    return found


@pytest.fixture
def small_timm(monkeypatch):
    """timm's models by name, small and without a download."""
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: create(name, **SMALL[name], **kw))


NAMES = [
    "vit at random",
    "resnet at random",
    "swin, run",
    "swin, teacher",
    "resnet, run",
    "resnet, teacher",
    "swin, class attention, run",
    "swin, class attention, teacher",
    "swin_tiny_patch4_window7_224, file",
    "resnet18, file",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of colors, four images each and two to test."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(("green", "red")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (40, 48, 3)).astype(np.uint8)
                pixels[..., 1 - c] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_davis(tmp_path_factory.mktemp("videos") / "set", videos=1, frames=4, size=64)


def evaluate(out: Path, command: str, checkpoint: str, *words) -> dict:
    """The result of a command; the names of its files for one without numbers."""
    main([command, "--checkpoint", checkpoint, "--out", str(out), *map(str, words)])
    results = list(out.glob("*.json"))
    return json.loads(results[0].read_text()) if results else {}


@pytest.mark.parametrize("name", [*NAMES, *(f"timm {name}" for name in SMALL)])
def test_every_command_takes_every_checkpoint(name, checkpoints, images, videos, small_timm, tmp_path, capsys):
    checkpoint, vit = checkpoints.get(name, name.removeprefix("timm ")), "vit" in name
    size = ("--protocol.size", 64) if name.startswith("timm") else ()
    reading = ("--reading.workers", 0, *size)
    found = evaluate(tmp_path / "knn", "knn", checkpoint, "--data", images, "--protocol.k", 1, *reading)
    assert found["metrics"]["k1"] >= 0.5
    found = evaluate(tmp_path / "linear", "linear", checkpoint, "--data", images, "--protocol.epochs", 2, *reading)
    assert found["changed"].keys() - {"layers", "size"} == {"epochs"}
    assert found["protocol"]["layers"] == (2 if vit else 1)
    assert ("layers" in found["changed"]) == vit, "the ViT has two blocks of the published four"
    assert any("2 blocks are read" in note for note in found["notes"]) == vit
    found = evaluate(tmp_path / "davis", "davis", checkpoint, "--data", videos, "--protocol.short-side", 64)
    assert 0 <= found["metrics"]["J&F"] <= 1
    views = ("--protocol.images", 4, "--protocol.points", 3, *size)
    found = evaluate(tmp_path / "relations", "relations", checkpoint, "--data", images / "val", *views)
    assert found["metrics"].keys() == {"spatial difference", "channel difference"}
    capsys.readouterr()
    pictures = ("--data", images / "val", "--protocol.images", 2, *size)
    evaluate(tmp_path / "pictures", "attention", checkpoint, *pictures)
    drawn = {path.stem for path in (tmp_path / "pictures/attention").glob("*.png")}
    page, screen = (tmp_path / "pictures/attention/index.html").read_text(), capsys.readouterr().out
    by_summary = name == "swin, class attention, run"  # which alone has that summary
    attention = {"class-attention", "query-attention"} if vit else {"class-attention"} if by_summary else set()
    assert drawn == {"similarity", "principal-components"} | attention
    assert ("Swin&#x27;s attention stays in windows, a ResNet has none" in page) == (not vit)
    assert ("note: no " in screen) == (not vit)
    assert ("no class attention" in screen) == (not vit and not by_summary)


@pytest.mark.parametrize("name", ["swin, run", "resnet, run", "timm resnet18"])
def test_only_the_last_block_of_stages_can_be_asked_for(name, checkpoints, images, videos, small_timm, tmp_path):
    checkpoint = checkpoints.get(name, name.removeprefix("timm "))
    encoder, pixels = open_checkpoint(checkpoint), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        encoded = encoder(pixels, layers=(-1,))
    (level,) = encoded.levels
    assert torch.equal(level.patches, encoded.patches)
    assert torch.equal(level.summary, encoded.patches.mean(1))
    with pytest.raises(ValueError, match=r"Only a ViT has patches .* after every block.*got blocks \[0\]"):
        encoder(pixels, layers=(0, -1))
    words = ["davis", "--checkpoint", checkpoint, "--data", str(videos), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="Only a ViT has patches"):
        main([*words, "--protocol.layer", "0"])
    words = ["linear", "--checkpoint", checkpoint, "--data", str(images), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"layers must not exceed the depth, got 4 of 1"):
        main([*words, "--protocol.layers", "4"])


def test_a_stage_of_a_video(checkpoints, videos, tmp_path):
    """The finer map gives other labels; a ViT has no stages."""
    words = ("--data", videos, "--protocol.short-side", 64, "--protocol.stage")
    checkpoint = checkpoints["resnet at random"]
    scores = [evaluate(tmp_path / str(n), "davis", checkpoint, *words, n)["metrics"]["J&F"] for n in (1, 4)]
    assert scores[0] > scores[1], "cells of 4 pixels against cells of 32, of which there are 4"
    with pytest.raises(SystemExit, match="needs a backbone with stages"):
        evaluate(tmp_path / "vit", "davis", VIT, *words, 1)


@pytest.mark.parametrize("name", ["swin, run", "resnet, file", "timm swin_tiny_patch4_window7_224", "timm resnet18"])
def test_the_maps_of_stages_are_four_different_ones(name, checkpoints, small_timm):
    checkpoint = {"resnet, file": checkpoints["resnet18, file"]}.get(
        name, checkpoints.get(name, name.removeprefix("timm "))
    )
    encoder = open_checkpoint(checkpoint)
    with torch.no_grad():
        maps = encoder.maps(torch.randn(1, 3, 64, 64))
    strides = [level.stride for level in encoder.map_levels]
    assert strides == [strides[0] * 2**stage for stage in range(4)]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (lv.channels, 64 // lv.stride, 64 // lv.stride) for lv in encoder.map_levels
    ]
    if strides[0] == 4:
        pyramid = Pyramid(encoder.map_levels)
        assert [m.shape[-1] for m in pyramid(maps)] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("checkpoint", "layers", "average_pool"),
    [
        ("random:vit_small,depth=4", 4, False),
        ("random:vit_base,depth=2", 1, True),
        ("random:swin_tiny,depth=1,stem_width=32", 1, False),
        ("random:resnet18", 1, False),
    ],
)
def test_linear_is_as_published_for_the_backbone(checkpoint, layers, average_pool):
    """DINO: ViT-S 4 class tokens, ViT-B the last one and the mean of the patches, ResNet its mean; MoBY: Swin its mean."""
    encoder = open_checkpoint(checkpoint)
    published = published_linear(encoder)
    assert (published.layers, published.average_pool) == (layers, average_pool)
    assert changed_fields(LinearProtocol().on(encoder), published) == {}, "nothing to complain of"
    assert changed_fields(LinearProtocol(average_pool=not average_pool).on(encoder), published) == {
        "average_pool": [average_pool, not average_pool]
    }
