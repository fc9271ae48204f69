"""The contract of every loader: the same stream for any ranks, workers and restarts; correct boxes; bad files."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.pictures import Pictures, write_pictures
from PIL import Image

from patchlight.data.crop_picture import draw_crops
from patchlight.data.interface import Loader, epoch_order
from patchlight.data.loaders import build_loader, dali_is_there
from patchlight.data.policy import UNCHANGED, CropPolicy, dino_policy
from patchlight.data.procedural import ProceduralSource
from patchlight.data.sources import ImageFolder
from patchlight.data.torchvision_loader import TorchvisionLoader
from patchlight.records import Views

needs_dali = pytest.mark.skipif(not dali_is_there(), reason="NVIDIA DALI is not installed")
POLICY = dino_policy(2, 24, 12)


@pytest.fixture(params=["torchvision", pytest.param("dali", marks=needs_dali)])
def build(request):
    """Builds the loader under test, and ends it."""
    built = []

    def build(*arguments, **options) -> Loader:
        built.append(build_loader(request.param, *arguments, **options))
        return built[-1]

    build.name = request.param
    yield build
    for loader in built:
        loader.close()


def plain(policy: CropPolicy) -> CropPolicy:
    """The same crops without changes of color."""

    def changed(specs):
        return tuple(replace(spec, photometric=UNCHANGED) for spec in specs)

    return replace(
        policy, global_crops=changed(policy.global_crops), local_crops=changed(policy.local_crops), mean=(0, 0, 0),
        std=(1, 1, 1),
    )  # fmt: skip


def steps(loader: Loader, count: int) -> list[Views]:
    return [next(loader) for _ in range(count)]


def joined(ranks: list[list[Views]]) -> list[list[torch.Tensor]]:
    """Per step, all tensors of the ranks' parts, concatenated."""
    out = []
    for parts in zip(*ranks, strict=True):
        crops = [c for name in ("global_crops", "local_crops") for c in [[getattr(p, name) for p in parts]]]
        tensors = [
            torch.cat([getattr(c, name) for c in part], 1) for part in crops for name in ("pixels", "box", "flip")
        ]
        out.append([torch.cat([p.ids for p in parts]), *tensors])
    return out


def assert_same(one: list[list[torch.Tensor]], two: list[list[torch.Tensor]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for left, right in zip(a, b, strict=True):
            assert torch.equal(left, right)


def test_shapes_and_types(build):
    views = next(build(Pictures(10), POLICY, 3))
    crops = views.global_crops
    assert crops.pixels.shape == (2, 3, 3, 24, 24)
    assert crops.box.shape == (2, 3, 4)
    assert crops.flip.shape == (2, 3)
    assert (crops.pixels.dtype, crops.box.dtype, crops.flip.dtype) == (torch.float32, torch.float32, torch.bool)
    assert views.local_crops.pixels.shape == (2, 3, 3, 12, 12)
    assert views.query_crops is None
    assert views.ids.dtype == torch.int64
    assert views.ids.shape == (3,)


def test_everything_is_on_the_loaders_device(build):
    """torch's "meta" device stands for a GPU, as it is not the CPU."""
    views = next(build(Pictures(10), POLICY, 3, workers=1, device=torch.device("meta")))
    crops = (views.global_crops, views.local_crops)
    tensors = [views.ids, *(getattr(c, name) for c in crops for name in ("pixels", "box", "flip"))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_stream_does_not_depend_on_the_number_of_ranks(build, world):
    source = Pictures(31)
    alone = joined([steps(build(source, POLICY, 6, seed=5), 7)])
    ranks = [steps(build(source, POLICY, 6 // world, seed=5, rank=rank, world=world), 7) for rank in range(world)]
    assert_same(joined(ranks), alone)


def test_every_epoch_has_another_order_and_no_sample_twice(build):
    loader = build(Pictures(31), POLICY, 5)
    assert loader.steps_per_epoch == 6
    assert loader.dataset_size == 31
    epochs = [torch.cat([v.ids for v in steps(loader, 6)]) for _ in range(4)]
    for ids in epochs:
        assert len(ids.unique()) == 30, "six full batches, one sample dropped"
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    dropped = {(set(range(31)) - set(ids.tolist())).pop() for ids in epochs}
    assert len(dropped) > 1, "not always the same sample"


def test_an_order_is_a_permutation_of_its_own():
    orders = [epoch_order(seed, epoch, 1000) for seed in range(2) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    agreements = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 10
    assert np.array_equal(epoch_order(1, 2, 1000), orders[-1])


def test_a_sample_is_cropped_differently_in_every_epoch(build):
    loader = build(Pictures(6), POLICY, 6)
    first, second = steps(loader, 2)
    rows = [second.ids.tolist().index(i) for i in first.ids.tolist()]
    assert (first.global_crops.box != second.global_crops.box[:, rows]).any(-1).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 6, 8])
def test_a_resumed_stream_continues_exactly(build, stop, workers):
    """Within an epoch of six steps, at its end, and in the second one; with batches read ahead or not."""
    source = Pictures(31)
    whole = joined([steps(build(source, POLICY, 5), 11)])
    first = build(source, POLICY, 5, workers=workers)
    before = steps(first, stop)
    state = first.state_dict()
    steps(first, 1)  # a step that the crash loses
    first.close()
    second = build(source, POLICY, 5, workers=workers)
    steps(second, 1)  # something was read ahead already
    second.load_state_dict(state)
    after = steps(second, 11 - stop)
    second.close()
    assert_same(joined([before + after]), whole)


def test_a_stream_may_be_resumed_by_another_number_of_ranks(build):
    source = Pictures(31)
    alone = build(source, POLICY, 6)
    whole = joined([steps(alone, 7)])
    part = build(source, POLICY, 6)
    steps(part, 2)
    ranks = [build(source, POLICY, 2, rank=rank, world=3) for rank in range(3)]
    for loader in ranks:
        loader.load_state_dict(part.state_dict())
    assert_same(joined([steps(loader, 5) for loader in ranks]), whole[2:])


@pytest.mark.parametrize(("other", "key"), [({"seed": 1}, "seed"), ({"source": Pictures(30)}, "dataset_size")])
def test_other_data_are_refused(other, key):
    given = {"source": Pictures(31), "policy": POLICY, "batch": 5}
    state = TorchvisionLoader(**given).state_dict()
    with pytest.raises(ValueError, match=f"same data in the same order, got {key}="):
        TorchvisionLoader(**(given | other)).load_state_dict(state)


def test_renamed_files_are_refused(tmp_path):
    write_pictures(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "b/3.png"])
    state = TorchvisionLoader(ImageFolder(tmp_path / "a"), POLICY, 2).state_dict()
    with pytest.raises(ValueError, match="got fingerprint="):
        TorchvisionLoader(ImageFolder(tmp_path / "b"), POLICY, 2).load_state_dict(state)


def recrop(image: np.ndarray, box: list[float], flip: bool, size: int) -> np.ndarray:
    """The crop as Pillow makes it: columns first, then rows; by itself Pillow starts with the cheaper direction."""
    x, y, w, h = (int(v) for v in box)
    crop = Image.fromarray(image).crop((x, y, x + w, y + h)).resize((size, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(float)
    return pixels[:, :, ::-1] if flip else pixels


def region(image: np.ndarray, box: list[float], flip: bool, size: int) -> np.ndarray:
    """The same in float64 as DALI resizes a region: it reads beyond the box, and repeats the image's outermost pixels."""
    x, y, w, h = box
    rows, columns = weights(image.shape[0], y, h, size), weights(image.shape[1], x, w, size)
    pixels = np.einsum("ih,hwc,jw->cij", rows, image.astype(float), columns).clip(0, 255)
    return pixels[:, :, ::-1] if flip else pixels


def weights(length: int, start: float, extent: float, size: int) -> np.ndarray:
    """The matrix [size, length] of a cubic (a = -1/2), widened where it shrinks, over a part of a line of pixels."""
    out, scale = np.zeros((size, length)), extent / size
    for i in range(size):
        center, reach = start + (i + 0.5) * scale, max(scale, 1)
        k = np.arange(int(center - 2 * reach) - 2, int(center + 2 * reach) + 3)
        t = np.abs((k + 0.5 - center) / reach)
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        tap = np.where(t < 1, near, np.where(t < 2, far, 0))
        np.add.at(out[i], k.clip(0, length - 1), tap / tap.sum())
    return out


@pytest.mark.parametrize("source", [Pictures(12), ProceduralSource(12, 40)], ids=["pictures", "procedural"])
def test_box_and_flip_reproduce_each_crop(build, source):
    views = next(build(source, plain(POLICY), 12))
    again = recrop if build.name == "torchvision" else region
    flips = 0
    for crops in (views.global_crops, views.local_crops):
        size = crops.pixels.shape[-1]
        for v in range(len(crops.pixels)):
            for b, sample in enumerate(views.ids.tolist()):
                pixels = crops.pixels[v, b].numpy() * 255
                box, flip = crops.box[v, b].tolist(), bool(crops.flip[v, b])
                flips += flip
                image = source.read(sample)
                right = np.abs(again(image, box, flip, size) - pixels).max()
                assert right <= 1.01, "libraries may round differently, no more"
                mirrored = np.abs(again(image, box, not flip, size) - pixels).max()
                moved = np.abs(again(image, [box[0] + 2, *box[1:]], flip, size) - pixels).max()
                assert min(mirrored, moved) > 5, "a wrong flip or box would be found"
    assert 10 < flips < 38


def test_pixels_are_normalized():
    source = Pictures(4)
    policy = plain(POLICY)
    raw = next(TorchvisionLoader(source, policy, 4)).global_crops.pixels
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    done = next(TorchvisionLoader(source, replace(policy, mean=mean, std=std), 4)).global_crops.pixels
    expected = (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert (done - expected).abs().max() < 1e-5


def test_a_damaged_sample_is_replaced_counted_and_named(build):
    source = Pictures(12, bad=(3, 7))
    loader = build(source, POLICY, 6, most_bad=0.5)
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        views = steps(loader, 2)
    sentences = [str(w.message) for w in warned]
    assert any("picture 3 cannot be read (OSError: broken data stream)" in s for s in sentences)
    assert any("picture 7 cannot be read" in s for s in sentences)
    assert loader.replaced == 2
    ids = torch.cat([v.ids for v in views]).tolist()
    assert len(ids) == 12
    assert not {3, 7} & set(ids), "ids are those of the images that were read"
    again = build(source, POLICY, 6, most_bad=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(joined([steps(again, 2)]), joined([views]))
        again.load_state_dict(loader.state_dict())
    assert again.replaced == 2, "the count is part of the state"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_bad_files_is_read_to_its_end(build, tmp_path, workers):
    names = [f"{number}.png" for number in range(12)]
    write_pictures(tmp_path, names)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "5.png").write_text("no image")
    Image.open(tmp_path / "6.png").convert("RGB").save(tmp_path / "7.png", "JPEG")  # a wrong name does no harm
    loader = build(ImageFolder(tmp_path), POLICY, 4, workers=workers, most_bad=0.5)
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        views = steps(loader, 6)
    loader.close()
    named = {name for name in names for w in warned if f"/{name} cannot be read" in str(w.message)}
    assert named == {"1.png", "2.png", "5.png"}
    assert loader.replaced == 6, "three in each of two epochs"
    assert all(len(v.ids) == 4 and v.global_crops.pixels.isfinite().all() for v in views)


def test_nothing_but_damaged_samples_is_an_error(build):
    with pytest.raises(OSError, match="must be readable, got none for picture"):
        next(build(Pictures(20, bad=tuple(range(20))), POLICY, 4))


def test_the_waiting_time_is_measured(build):
    class Slow(Pictures):
        def read(self, index):
            import time

            time.sleep(0.02)
            return super().read(index)

    loader = build(Slow(8), POLICY, 4)
    assert loader.stall_seconds == 0
    next(loader)
    assert 0.08 <= loader.stall_seconds < 5


def test_too_little_data_and_wrong_ranks_are_named():
    with pytest.raises(ValueError, match="got 10 images for 4 images x 3 ranks"):
        TorchvisionLoader(Pictures(10), POLICY, 4, world=3)
    with pytest.raises(ValueError, match="got batch=4, rank=2, world=2"):
        TorchvisionLoader(Pictures(10), POLICY, 4, rank=2, world=2)


def test_the_picture_has_sources_and_crops():
    source = ProceduralSource(8, 40)
    views = next(TorchvisionLoader(source, POLICY, 4))
    picture = draw_crops(views, source, POLICY, count=3)
    assert picture.width > 3 * 128
    assert 3 * 128 <= picture.height < 3 * 160
    colors = {color for _, color in picture.getcolors(picture.width * picture.height)}
    assert {(0x2F, 0x6F, 0xDE), (0xE0, 0x86, 0x2C)} <= colors, "frames of global and local crops"
