"""The line that a run prints loads its teacher in timm: for every family, at usual and at other sizes."""

import ast
import re
from pathlib import Path

import pytest
import timm
import torch
from parity import ROOT
from safetensors.torch import save_file

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.timm_line import timm_line
from patchlight.engine.assembly import build_branches, build_objectives
from patchlight.engine.checkpoint import timm_weights
from patchlight.recipes import RECIPES

SIZES = {
    "vit_tiny": [{}, {"class_token": False}, {"class_token": False, "image_size": 64, "patch_size": 8}],
    "vit_small": [{"image_size": 96}, {"heads": 12}, {"depth": 3, "width": 96, "heads": 3, "mlp_ratio": 2.0}],
    "swin_tiny": [{}, {"image_size": 64, "window": 4, "depth": 2}],
    "resnet18": [{}],
    "resnet50": [{}, {"stem_width": 32}],
}


@pytest.mark.parametrize(
    ("arch", "sizes"), [(arch, sizes) for arch, several in SIZES.items() for sizes in several], ids=str
)
def test_the_line_gives_the_same_network(arch, sizes, tmp_path):
    ours = build_backbone(arch, **sizes).eval()
    weights = {name: tensor for name, tensor in ours.state_dict().items() if name != "mask_token"}
    if (
        ours.norm_eps is not None and "norm.weight" not in weights
    ):  # the summary has it, and an export takes it from there
        weights |= {"norm.weight": torch.ones(ours.width), "norm.bias": torch.zeros(ours.width)}
    path, size = tmp_path / "teacher.safetensors", sizes.get("image_size", 224)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    line = timm_line({name: tuple(tensor.shape) for name, tensor in weights.items()}, ours.heads, size, path)
    model = eval(line, {"timm": timm}).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        there = model.forward_features(image)
        here = ours(image)
    here = here.patches if here.cls is None else torch.cat([here.cls[:, None], here.patches], dim=1)
    if arch.startswith("resnet"):
        there = there.flatten(2).mT
    else:
        there = there.flatten(1, -2)  # Swin's has two dimensions of patches
        here = here if "norm.weight" in ours.state_dict() else model.norm(here)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["debug", "small_data", "moco_v3_vits16_in1k", "pqcl_vits16_in1k"])
def test_the_line_of_a_recipe(recipe, tmp_path):
    run = RECIPES[recipe]()
    _, teacher = build_branches(run.model, build_objectives(run).objectives())
    path = tmp_path / "teacher.safetensors"
    save_file(timm_weights(teacher), path)
    shapes = {name: tuple(tensor.shape) for name, tensor in teacher.backbone.state_dict().items()}
    line = timm_line(shapes, teacher.backbone.heads, run.model.image_size, path)
    model = eval(line, {"timm": timm})
    assert torch.equal(model.norm.weight, timm_weights(teacher)["norm.weight"])


def test_the_page_shows_the_line_of_small_data():
    run = RECIPES["small_data"]()
    _, teacher = build_branches(run.model, build_objectives(run).objectives())
    shapes = {name: tuple(tensor.shape) for name, tensor in teacher.backbone.state_dict().items()}
    line = timm_line(shapes, teacher.backbone.heads, run.model.image_size, Path("runs/.../teacher.safetensors"))
    (shown,) = re.findall(
        r"^timm\.create_model\(.*?^\)$", (ROOT / "docs/training.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert ast.dump(ast.parse(shown)) == ast.dump(ast.parse(line))
