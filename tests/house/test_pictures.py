"""The pictures of docs: drawn by their script, small, and shown by a page."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import timm
import torch
from parity import ROOT, SEED
from PIL import Image
from safetensors.torch import save_file

PICTURES = ROOT / "docs/pictures"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("matplotlib", reason='pictures need pip install ".[bench]"')
    spec = importlib.util.spec_from_file_location("draw", PICTURES / "draw.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = module
    spec.loader.exec_module(module)
    return module


def test_every_picture_is_there_small_and_shown(script):
    text = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert {path.stem for path in PICTURES.glob("*.png")} == set(script.PICTURES)
    for name in script.PICTURES:
        path = PICTURES / f"{name}.png"
        assert path.stat().st_size <= 60_000
        assert Image.open(path).width == script.WIDTH * script.DPI
        assert f"pictures/{name}.png" in text, f"no page shows {name}"


def test_pictures_are_drawn(script, tmp_path):
    """With the features of an untrained network, which is made in a moment."""
    torch.manual_seed(SEED)
    network = timm.create_model("vit_tiny_patch16_224", patch_size=8, img_size=112, depth=1, num_classes=0)
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    names = ["ibot", "selfpatch", "sere"]
    script.main([str(tmp_path / "network.safetensors"), "--out", str(tmp_path), "--only", *names])
    for name in names:
        drawn, kept = (Image.open(folder / f"{name}.png") for folder in (tmp_path, PICTURES))
        assert drawn.size == kept.size
        assert np.asarray(drawn.convert("L")).std() > 20
    alike = [np.asarray(Image.open(folder / "ibot.png").convert("L"), float) for folder in (tmp_path, PICTURES)]
    assert abs(alike[0] - alike[1]).mean() < 8  # no network: the same picture, whatever the versions of fonts


def test_the_pictures_windows_are_those_of_the_operation(script):
    """All candidates of a border patch, as the operation finds them when it takes as many neighbors as there are."""
    from patchlight_kernels import neighbor_topk

    x = torch.randn(1, 36, 4)
    for border, count in (("wrap", 8), ("clip", 3)):
        found = neighbor_topk(x, (6, 6), count, radius=1, border=border)[0, 0].tolist()
        assert sorted(found) == sorted(row * 6 + column for row, column in script.window(0, 0, 6, 6, border))
