"""The folder for timm and the Hub: timm computes what the run's teacher computes, nothing of this machine is in it."""

import json

import numpy as np
import pytest
import timm
import torch
from export.teachers import RUNS, saved_run
from PIL import Image

from patchlight.command import main
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.export import hub_folder


def export(*words) -> None:
    main(["export", "hub", *map(str, words)])


def timm_patches(features, model):
    """As a user of timm takes them."""
    if features.ndim == 3:
        return features[:, model.num_prefix_tokens :]
    return features.flatten(1, 2) if hasattr(model, "patch_embed") else features.flatten(2).mT


@pytest.mark.parametrize("kind", RUNS)
def test_timm_and_patchlight_load_what_the_run_has_learned(kind, tmp_path):
    run, out = saved_run(tmp_path / "my run", kind), tmp_path / "my export"
    export("--checkpoint", run, "--folder", out)
    model, ours, again = (
        timm.create_model(f"local-dir:{out}", pretrained=True).eval(),
        *map(open_checkpoint, (str(run), str(out))),
    )
    size = ours.input_format.image_size
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected, found, exact = ours(pixels), again(pixels), ours.double()(pixels.double())
        patches, summary = timm_patches(model.forward_features(pixels), model), model(pixels)
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.summary, expected.summary)
    assert again.input_format == ours.input_format
    assert not again.notes
    rounding = 1e-5 * float(exact.patches.abs().max())
    assert (patches - exact.patches).abs().max() < rounding
    if kind == "class attention":
        assert (summary - exact.patches.mean(1)).abs().max() < rounding, "timm's mean of the patches"
        assert (summary - exact.summary).abs().max() > 1e-2
    else:
        assert (summary - exact.summary).abs().max() < rounding
    config = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert (config["num_classes"], config["input_size"], tuple(config["mean"])) == (
        0,
        [3, size, size],
        ours.input_format.mean,
    )
    prepared = timm.data.resolve_model_data_config(model)
    steps = timm.data.create_transform(**prepared, is_training=False).transforms
    assert steps[0].size == round(size * 256 / 224), "as our evaluation resizes"
    assert tuple(prepared["input_size"]) == (3, size, size)
    for name in (config["first_conv"], config["classifier"]):
        model.get_submodule(name)


def test_a_folder_holds_no_path_of_this_machine(tmp_path):
    parts = {"model": {"sizes": {"width": 24, "depth": 1, "heads": 2}}}
    run, out = saved_run(tmp_path / "anna" / "secret", **parts), tmp_path / "out"
    (run / "environment.json").write_text(
        json.dumps({"command": f"train.py {tmp_path}/photos", "python": "3", "cpu": "C"})
    )
    export("--checkpoint", run, "--folder", out)
    for file in out.iterdir():
        assert file.stat().st_mode == (run / "run.json").stat().st_mode, "as other files of this user"
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
        assert b"anna" not in file.read_bytes(), file.name
    assert json.loads((out / "run.json").read_text())["output"]["folder"] == "secret", "the last part alone"
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "config.json",
        "facts.json",
        "model.safetensors",
        "run.json",
    ]


def test_knn_of_an_exported_folder(tmp_path, monkeypatch):
    run, out = saved_run(tmp_path / "run", "class attention"), tmp_path / "out"
    export("--checkpoint", run, "--folder", out)
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b", "c"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{number}.png")
    words = ["--data", str(tmp_path / "images"), "--reading.workers", "0", "--protocol.k", "1", "3"]
    for checkpoint in (run, out):
        main(["evaluate", "knn", "--checkpoint", str(checkpoint), *words])
    results = [json.loads((folder / "evaluation" / "knn-images.json").read_text()) for folder in (run, out)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[1]["notes"] == [], "the class attention was exported too"


def test_a_second_export_replaces_the_first_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "out"
    first, second = saved_run(tmp_path / "first", "class attention"), saved_run(tmp_path / "second", "moco v3")
    (first / "plots").mkdir()
    Image.new("RGB", (4, 4)).save(first / "plots" / "attention-0000000.png")
    export("--checkpoint", first, "--folder", out)
    assert "which holds images that it has read; --no-picture leaves it out" in capsys.readouterr().out
    assert {"summary.safetensors", "picture.png"} < {file.name for file in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    export("--checkpoint", second, "--folder", out)
    assert not {"summary.safetensors", "picture.png"} & {file.name for file in out.iterdir()}
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit, match=r"must be a run's folder .* an exported folder; pass the folder"):
        export("--checkpoint", out, "--folder", tmp_path / "other")


def test_a_picture_can_be_left_out(tmp_path):
    run, out = saved_run(tmp_path / "run"), tmp_path / "out"
    (run / "plots").mkdir()
    Image.new("RGB", (4, 4)).save(run / "plots" / "crops-0000000.png")
    export("--checkpoint", run, "--folder", out, "--no-picture")
    assert not (out / "picture.png").exists()
    assert "picture" not in (out / "README.md").read_text()


@pytest.mark.parametrize("wrong", ["heads", "eps"])
def test_another_network_in_timm_is_refused(wrong, tmp_path, monkeypatch):
    """Of the same shapes, so that its weights load."""
    run, out = saved_run(tmp_path / "run"), tmp_path / "out"
    if wrong == "heads":
        given = hub_folder.timm_name
        monkeypatch.setattr(hub_folder, "timm_name", lambda *a: (given(*a)[0], given(*a)[1] | {"num_heads": 2}))
    else:
        made = timm.create_model

        def other(*arguments, **options):
            model = made(*arguments, **options)
            model.norm.eps = 1e-5  # instead of 1e-6
            return model

        monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(
        SystemExit, match=r"must compute \w+ with an error of at most .* got .* for .* images?; that is 8 times"
    ):
        export("--checkpoint", run, "--folder", out)
    assert not list(out.iterdir()), "nothing that could be taken for a model"


def test_a_norm_that_timm_does_not_have(tmp_path):
    model = RUNS["resnet"]["model"] | {"summary": "class_attention"}
    run = saved_run(tmp_path / "run", "resnet", model=model)
    with pytest.raises(
        SystemExit, match=r"got class attention on a ResNet, .*; patchlight export onnx and torch write"
    ):
        export("--checkpoint", run, "--folder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_not_exported(tmp_path):
    run, out = saved_run(tmp_path / "run"), tmp_path / "out"
    (file,) = run.rglob("teacher.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"teacher.safetensors"):
        export("--checkpoint", run, "--folder", out)
    assert not (out / "model.safetensors").exists()
