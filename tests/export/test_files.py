"""ONNX files and programs of torch.export compute what PyTorch computes, and say what they need."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from export.teachers import RUNS, saved_run
from parity import ROOT

from patchlight.command import main
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.export import comparison, files, onnx_file, torch_file
from patchlight.export.traced import foreign_ops, open_teacher, trace

ALONE = """
import sys
sys.path.append(sys.argv[1])
import torch
program = torch.export.load(sys.argv[2])
pixels = torch.randn(4, 3, 16, 16)
with torch.no_grad():
    torch.save((pixels, *program.module()(pixels)), sys.argv[3])
try:
    import patchlight
except ModuleNotFoundError:
    print("alone")
"""


def export(*words) -> None:
    main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("some runs") / "run", "class attention")


def check_features(summary, patches, encoder, pixels) -> None:
    with torch.no_grad():
        expected = encoder(pixels)
    for found, there in ((summary, expected.summary), (patches, expected.patches)):
        torch.testing.assert_close(torch.as_tensor(found), there, rtol=0, atol=1e-5 * float(there.abs().max()))


@pytest.mark.parametrize("kind", RUNS)
def test_a_program_of_every_family(kind, tmp_path):
    """Its operations are PyTorch's own, and it names no file of this machine."""
    run, file = saved_run(tmp_path / "a run", kind), tmp_path / "a teacher.pt2"
    export("torch", "--checkpoint", run, "--file", file)
    program, encoder = torch.export.load(file), open_checkpoint(str(run))
    size = encoder.input_format.image_size
    for images in (1, 4):
        pixels = torch.randn(images, 3, size, size)
        check_features(*program.module()(pixels), encoder, pixels)
    assert foreign_ops(program) == []
    with zipfile.ZipFile(file) as parts:
        content = b"".join(map(parts.read, parts.namelist()))
    for place in (str(ROOT), str(tmp_path), "site-packages"):
        assert place.encode() not in content, place


def test_a_program_needs_torch_alone(run, tmp_path):
    """A Python that finds torch in its folder, but no patchlight: no PYTHONPATH, and no .pth files of installed packages."""
    file, out = tmp_path / "teacher.pt2", tmp_path / "out"
    export("torch", "--checkpoint", run, "--file", file)
    place = Path(torch.__file__).parents[1]
    words = [sys.executable, "-I", "-S", "-c", ALONE, str(place), str(file), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "alone\n", done.stderr
    pixels, summary, patches = torch.load(out)
    check_features(summary, patches, open_checkpoint(str(run)), pixels)


def test_an_op_of_another_library_is_found():
    @torch.library.custom_op("tests_of_export::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Other(torch.nn.Module):
        def forward(self, pixels):
            return twice(pixels)

    assert foreign_ops(torch.export.export(Other(), (torch.ones(2),))) == ["tests_of_export.twice.default"]


@pytest.mark.parametrize("kind", ["class token", "class attention", "swin", "resnet", "moco v3"])
def test_onnxruntime_computes_the_same(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    run, file = saved_run(tmp_path / "a run", kind), tmp_path / "new folder" / "a teacher.onnx"
    export("onnx", "--checkpoint", run, "--file", file)
    session, encoder = runtime.InferenceSession(str(file)), open_checkpoint(str(run))
    size = encoder.input_format.image_size
    pixels = torch.randn(5, 3, size, size)
    check_features(*session.run(["summary", "patches"], {"pixels": pixels.numpy()}), encoder, pixels)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == list(encoder.input_format.mean)
    assert json.loads(about["std"]) == list(encoder.input_format.std)
    assert (about["patch_size"], about["image_size"]) == (str(encoder.patch_size), str(size))
    methods = {"class attention": "DINO + SelfPatch", "resnet": "MoCo v3", "moco v3": "MoCo v3"}
    assert about["method"] == methods.get(kind, "DINO")
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("pixels", ["M", 3, size, size])
    content = file.read_bytes()
    for place in (str(ROOT), str(tmp_path), "site-packages"):
        assert place.encode() not in content, place
    assert [path.name for path in file.parent.iterdir()] == ["a teacher.onnx"]


def test_another_size_and_opset(tmp_path):
    """The positions of that size are in the file, as patchlight resizes them."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    run, file = saved_run(tmp_path / "run", "class token"), tmp_path / "larger.onnx"
    export("onnx", "--checkpoint", run, "--file", file, "--size", "24", "--opset", "19")
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = open_checkpoint(str(run))(pixels)
    found = runtime.InferenceSession(str(file)).run(["patches"], {"pixels": pixels.numpy()})[0]
    assert abs(found - expected.patches.numpy()).max() < 1e-5 * float(expected.patches.abs().max())
    native, larger = (trace(open_teacher(str(run), size, None)).graph.nodes for size in (16, 24))
    assert len(native) == len(larger), "no operation resizes the table again"
    import onnx

    model = onnx.load(str(file))
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 19)]


def test_what_differs_by_more_than_rounding_fails(run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "teacher.pt2"
    teacher = open_teacher(str(run), None, None)
    moved = {"by": 0.0}

    def run_of(_):
        largest = comparison.differences(teacher, teacher.features, ("summary", "patches"))
        allowed = 8 * max(d.rounding for d in largest if d.output == "patches")

        def compute(pixels):
            summary, patches = teacher.features(pixels)
            return summary, patches + moved["by"] * allowed * patches.abs().max()

        return compute

    monkeypatch.setattr(torch_file, "run_of", run_of)
    monkeypatch.setattr(torch_file, "write_program", lambda _, path: path.write_text("a program"))
    moved["by"] = 0.5
    export("torch", "--checkpoint", run, "--file", file)
    assert file.read_text() == "a program"
    moved["by"] = 2.0
    with pytest.raises(
        SystemExit, match=r"must compute patches with an error of at most .*; that is 8 times .* --tolerance"
    ):
        export("torch", "--checkpoint", run, "--file", file)
    assert (tmp_path / "teacher.pt2.failed").exists()
    assert file.exists(), "the earlier file stays"
    assert "kept as" in capsys.readouterr().out
    export("torch", "--checkpoint", run, "--file", file, "--tolerance", "20")
    assert not (tmp_path / "teacher.pt2.failed").exists(), "a failure of before"
    moved["by"] = torch.nan
    with pytest.raises(SystemExit, match="got inf for"):
        export("torch", "--checkpoint", run, "--file", file)


def test_published_weights_are_exported_too(tmp_path):
    """Whatever an evaluation opens can be exported."""
    tiny = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0, embed_dim=64, num_heads=1)
    torch.save(tiny.state_dict(), tmp_path / "vit.pth")
    export("torch", "--checkpoint", tmp_path / "vit.pth", "--file", tmp_path / "vit.pt2", "--size", "32")
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = tiny.eval().forward_features(pixels)
        summary, patches = torch.export.load(tmp_path / "vit.pt2").module()(pixels)
    torch.testing.assert_close(torch.cat([summary[:, None], patches], dim=1), expected, rtol=0, atol=1e-5)


def test_a_missing_package_is_named(run, tmp_path, monkeypatch):
    found = files.importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    sentence = r'This export needs onnx.*, got a Python without .*onnxscript.*; pip install "patchlight\[export\]"'
    with pytest.raises(SystemExit, match=sentence):
        export("onnx", "--checkpoint", run, "--file", tmp_path / "teacher.onnx")


def test_too_many_weights_for_onnx(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    with pytest.raises(
        SystemExit, match=r"at most 2 GiB of weights, got .*; patchlight export torch has no such limit"
    ):
        export("onnx", "--checkpoint", run, "--file", tmp_path / "teacher.onnx")
