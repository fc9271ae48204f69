"""The DALI loader beside the torchvision loader: one table for both, equal images, each operator, recovery from errors."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.pictures import Pictures, picture, write_awkward_files, write_pictures, write_shards
from PIL import Image

from patchlight.data.loaders import build_loader, dali_is_there
from patchlight.data.policy import UNCHANGED, CropPolicy, CropSpec, Photometric, dino_policy
from patchlight.data.sources import ImageFolder, open_source
from patchlight.records import Crops, Views

pytestmark = pytest.mark.skipif(not dali_is_there(), reason="NVIDIA DALI is not installed")

PLAIN = {"mean": (0, 0, 0), "std": (1 / 255, 1 / 255, 1 / 255)}  # pixels stay 0..255
NOTHING = replace(UNCHANGED, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


def batches(name: str, source, policy: CropPolicy, batch: int, count: int = 1, **options) -> list[Views]:
    loader = build_loader(name, source, policy, batch, **options)
    views = [next(loader) for _ in range(count)]
    loader.close()
    return views


def kinds(views: Views) -> list[Crops]:
    return [crops for crops in (views.global_crops, views.local_crops, views.query_crops) if crops is not None]


def test_one_table_for_both_loaders_and_any_kinds_of_crops():
    """Two specs of one kind, three kinds, odd counts: the loader works for any number of them."""
    changes = Photometric(blur=0.5, solarize=0.5)
    specs = tuple(CropSpec(n, 24, (0.4, 1.0), photometric=changes) for n in (1, 2))
    query = CropSpec(1, 16, (0.2, 0.5), flip=0.0, photometric=UNCHANGED)
    policy = CropPolicy(specs, (CropSpec(3, 12, (0.1, 0.4)),), (query,), **PLAIN)
    source = Pictures(23)
    for dali, reference in zip(
        *(batches(n, source, policy, 5, 6, seed=4) for n in ("dali", "torchvision")), strict=True
    ):
        assert torch.equal(dali.ids, reference.ids)
        for one, two in zip(kinds(dali), kinds(reference), strict=True):
            assert torch.equal(one.box, two.box)
            assert torch.equal(one.flip, two.flip)
            assert one.pixels.shape == two.pixels.shape
            difference = (one.pixels - two.pixels).abs()
            assert difference.mean() < 1.0, "crops of the same boxes with the same colors"
    assert [len(crops.pixels) for crops in kinds(dali)] == [3, 3, 1]


def test_crops_of_both_loaders_differ_at_their_rims_only(tmp_path):
    """Of a photo's size. torchvision rounds between columns and rows; at the rim DALI reads pixels beyond the box."""
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.jpg", quality=95)
    plain = tuple(replace(spec, photometric=NOTHING) for spec in dino_policy(6).global_crops)
    local = (replace(dino_policy(6).local_crops[0], photometric=NOTHING),)
    policy = CropPolicy(plain, local, **PLAIN)
    dali, reference = (batches(name, ImageFolder(tmp_path), policy, 4)[0] for name in ("dali", "torchvision"))
    for one, two in zip(kinds(dali), kinds(reference), strict=True):
        difference = (one.pixels - two.pixels).abs()
        print(f"resize: mean {difference.mean():.2f}, at the rim up to {difference.max():.0f}")
        assert difference.mean() < 0.25
        inner = difference[..., 4:-4, 4:-4]
        assert inner.max() <= 4
        assert (inner > 1).float().mean() < 1e-3
        assert difference.max() < 24


@pytest.fixture(scope="module")
def awkward(tmp_path_factory) -> tuple[Path, dict[str, bool]]:
    folder = tmp_path_factory.mktemp("awkward")
    return folder, write_awkward_files(folder)


def whole_pictures(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Each readable file as a whole, without flips and changes of color, by name; and how many were replaced."""
    policy = CropPolicy((CropSpec(1, 64, (1.0, 1.0), (0.1, 10.0), flip=0.0, photometric=NOTHING),), **PLAIN)
    source = ImageFolder(folder)
    loader = build_loader(name, source, policy, 1, most_bad=0.5)
    pictures = {}
    for _ in range(len(source)):
        views = next(loader)
        pictures[source.names[views.ids.item()]] = views.global_crops.pixels[0, 0], views.global_crops.box[0, 0]
    loader.close()
    return pictures, loader.replaced


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_awkward_files_are_the_same_picture_in_both_loaders(awkward):
    folder, files = awkward
    (dali, replaced), (reference, also_replaced) = (whole_pictures(name, folder) for name in ("dali", "torchvision"))
    assert replaced == also_replaced == sum(not good for good in files.values())
    assert dali.keys() == reference.keys() == {name for name, good in files.items() if good}
    for name, (pixels, box) in dali.items():
        assert torch.equal(box, reference[name][1]), name
        difference = (pixels - reference[name][0]).abs()
        assert difference.mean() < 0.4, name
        assert difference[..., 4:-4, 4:-4].max() <= 4, (
            f"{name}: a sharp picture is clipped between torchvision's two passes"
        )


def test_a_file_that_only_a_decoder_finds_bad_is_replaced_alone(tmp_path):
    """A PNG with a correct beginning and end: DALI loses its batch, and gets the same batch again."""
    write_pictures(tmp_path, [f"{number:02}.png" for number in range(24)])
    data = bytearray((tmp_path / "07.png").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    (tmp_path / "07.png").write_bytes(data)
    policy = CropPolicy((CropSpec(1, 16, (0.4, 1.0), photometric=NOTHING),), **PLAIN)
    source = ImageFolder(tmp_path)
    with pytest.warns(UserWarning, match=r"DALI failed on a batch .*; Pillow decodes \d batches"):
        dali = batches("dali", source, policy, 4, 12, workers=2, most_bad=0.5)
    with pytest.warns(UserWarning, match=r"07.png cannot be read \(OSError: "):
        reference = batches("torchvision", source, policy, 4, 12, most_bad=0.5)
    for one, two in zip(dali, reference, strict=True):
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.global_crops.box, two.global_crops.box)
        assert (one.global_crops.pixels - two.global_crops.pixels).abs().mean() < 1
    assert sum((views.ids == 7).sum() for views in dali) == 0


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_missing_file_is_replaced_by_the_same_sample_in_both(tmp_path):
    write_pictures(tmp_path, [f"{number}.jpg" for number in range(6)])
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg\n" for number in range(7)))  # one more than there are
    policy, source = dino_policy(0, 16), open_source(tmp_path / "list.txt")
    dali, reference = (batches(name, source, policy, 7, most_bad=0.5)[0] for name in ("dali", "torchvision"))
    assert torch.equal(dali.ids, reference.ids)
    assert set(dali.ids.tolist()) == set(range(6))
    assert len(dali.ids) == 7


@pytest.mark.parametrize("photometric", ["op", "dali"])
def test_the_graph_for_a_gpu_can_be_put_together_without_one(photometric):
    """DALI checks there that every operator exists for its device and that its arguments are on the right device."""
    from patchlight.data.dali_loader import crop_graph

    def inputs() -> list:
        raise AssertionError("the graph does not run")

    policy = dino_policy(3, 48, 24)
    graph = crop_graph(policy, inputs, photometric, batch_size=4, num_threads=1, device_id=0)
    assert [output.device for output in graph._graph_out] == ["gpu"] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_graph_runs_on_a_gpu(tmp_path):
    """Another JPEG decoder: pictures are similar, not equal."""
    write_pictures(tmp_path, [f"{number:02}.jpg" for number in range(16)])
    policy = replace(dino_policy(3, 48, 24), **PLAIN)
    source = ImageFolder(tmp_path)
    dali, reference = (batches(n, source, policy, 8, 4, workers=2, device="cuda") for n in ("dali", "torchvision"))
    for one, two in zip(dali, reference, strict=True):
        assert torch.equal(one.ids, two.ids)
        for mine, other in zip(kinds(one), kinds(two), strict=True):
            assert mine.pixels.is_cuda
            assert torch.equal(mine.box, other.box)
            assert (mine.pixels - other.pixels).abs().mean() < 3


def test_shards_are_read_too(tmp_path):
    pictures = write_shards(tmp_path, [3, 5])
    policy = CropPolicy((CropSpec(1, 40, (1.0, 1.0), (0.1, 10.0), flip=0.0, photometric=NOTHING),), **PLAIN)
    source = open_source(tmp_path)
    views, reference = batches("dali", source, policy, 4, 2), batches("torchvision", source, policy, 4, 2)
    assert sorted(torch.cat([v.ids for v in views]).tolist()) == list(range(len(pictures)))
    for one, two in zip(views, reference, strict=True):
        assert (one.global_crops.pixels - two.global_crops.pixels)[..., 4:-4, 4:-4].abs().max() <= 1.01


@pytest.mark.filterwarnings("ignore:.*cannot be read")
@pytest.mark.parametrize("name", ["dali", "torchvision"])
def test_too_many_bad_files_end_the_run_with_a_report(tmp_path, name):
    write_pictures(tmp_path / "images", [f"{number:02}.png" for number in range(20)])
    for number in (3, 11):
        (tmp_path / "images" / f"{number:02}.png").write_bytes(b"")
    policy, report = dino_policy(0, 16), tmp_path / "run" / "bad_files.tsv"
    given = {"source": ImageFolder(tmp_path / "images"), "policy": policy, "batch": 20}
    with pytest.raises(
        RuntimeError, match=r"at most 5.00% of 20 images .* got 2 on rank 0 alone, listed in .*bad_files.tsv"
    ):
        batches(name, **given, report=report)
    lines = sorted(line.split("\t")[0].rsplit("/", 1)[1] for line in report.read_text().splitlines())
    assert lines == ["03.png", "11.png"]
    report.unlink()
    batches(name, **given, count=3, most_bad=0.1, report=report)
    assert len(report.read_text().splitlines()) == 2, "each file once"


OPERATORS = {  # alone, in steps of 0..255: the largest and the mean difference between our op and DALI's operators
    "brightness": (Photometric(1.0, 0.4, 0, 0, 0, 0, 0), 0.51, 0.26),
    "contrast": (Photometric(1.0, 0, 0.4, 0, 0, 0, 0), 0.52, 0.26),
    "saturation": (Photometric(1.0, 0, 0, 0.4, 0, 0, 0), 0.8, 0.26),
    "gray": (Photometric(0.0, gray=1.0, blur=0.0), 1.25, 0.35),
    "blur": (Photometric(0.0, gray=0.0, blur=1.0), 0.51, 0.26),
    "solarize": (Photometric(0.0, gray=0.0, blur=0.0, solarize=1.0), 0.0, 0.0),
    "nothing": (NOTHING, 0.0, 0.0),
}
OTHERS = {  # the same, where they are another augmentation: at least this much on average
    "hue": (Photometric(1.0, 0, 0, 0, 0.1, 0, 0), 5.0),
    "jitter": (Photometric(1.0, gray=0.0, blur=0.0), 5.0),
}


def operator_difference(name: str, changes: Photometric) -> torch.Tensor:
    policy = CropPolicy((CropSpec(2, 48, (0.4, 1.0), photometric=changes),), **PLAIN)
    ours, theirs = (batches("dali", Pictures(16), policy, 16, photometric=p)[0] for p in ("op", "dali"))
    assert torch.equal(ours.global_crops.box, theirs.global_crops.box)
    difference = (ours.global_crops.pixels - theirs.global_crops.pixels).abs()
    print(
        f"{name}: largest {difference.max():.2f}, mean {difference.mean():.2f}"
    )  # pytest -s prints the numbers of docs/data.md
    return difference


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_of_dali_beside_the_op(name):
    changes, most, mean = OPERATORS[name]
    difference = operator_difference(name, changes)
    assert difference.max() <= most + 1e-3
    assert difference.mean() <= mean + 1e-3


@pytest.mark.parametrize("name", OTHERS)
def test_what_dali_does_differently(name):
    changes, mean = OTHERS[name]
    assert operator_difference(name, changes).mean() > mean


ENDINGS = {
    "finished": "loader.close()",
    "not closed": "",
    "interrupted": "raise SystemExit(0)",
    "kept elsewhere": "import builtins; builtins.kept = loader, views",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_without_errors(ending):
    code = f"""
from data.pictures import Pictures
from patchlight.data.loaders import build_loader
from patchlight.data.policy import dino_policy
loader = build_loader("dali", Pictures(12), dino_policy(2, 24, 12), 3, workers=2)
views = [next(loader) for _ in range(3)]
{ENDINGS[ending]}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr


def test_pixels_do_not_change_after_they_are_handed_over():
    """DALI's buffers are its own: later batches must not be written into earlier ones."""
    loader = build_loader("dali", Pictures(30), dino_policy(2, 24, 12), 3, workers=1)
    views = [next(loader) for _ in range(2)]
    kept = [crops.pixels.clone() for v in views for crops in kinds(v)]
    for _ in range(8):
        next(loader)
    loader.close()
    for then, now in zip(kept, [crops.pixels for v in views for crops in kinds(v)], strict=True):
        assert torch.equal(then, now)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat(tmp_path):
    """Pictures of many sizes: after the first epochs the buffers fit the largest."""
    for number in range(24):
        side = 60 + 17 * number
        Image.fromarray(picture(number)).resize((side, side * 3 // 4)).save(tmp_path / f"{number}.jpg")
    loader = build_loader("dali", ImageFolder(tmp_path), dino_policy(2, 48, 24), 6, workers=2)

    def megabytes_after(epochs: int) -> float:
        for _ in range(4 * epochs):
            next(loader)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    settled = megabytes_after(6)
    assert megabytes_after(12) < settled + 12
    loader.close()
