"""A data set with a length and items by number: a source like files, with labels, a fingerprint and named items."""

import json

import numpy as np
import pytest
import torch
from data.pictures import picture, write_pictures
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from patchlight.data.check_data import check_images
from patchlight.data.dataset_source import DatasetSource
from patchlight.data.policy import dino_policy
from patchlight.data.sources import ImageFolder, open_images, open_own, open_source
from patchlight.data.streams import ImageStream
from patchlight.data.torchvision_loader import TorchvisionLoader
from patchlight.evaluation.probes.labeled import open_labeled

POLICY = dino_policy(2, 24, 12)


class MyDataset(Dataset):
    """Pictures with their classes; some cannot be read."""

    def __init__(self, count: int = 31, bad: tuple[int, ...] = (), first: int = 0) -> None:
        self.count, self.bad, self.first = count, bad, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index in self.bad:
            raise OSError("broken data stream")
        return Image.fromarray(picture(self.first + index)), index % 3


def with_attributes(**attributes) -> MyDataset:
    dataset = MyDataset(6)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def steps(loader, count: int) -> list[torch.Tensor]:
    return [tensor for _ in range(count) for tensor in next(loader).tensors()]


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_its_crops_are_those_of_the_same_images_in_files(tmp_path):
    write_pictures(tmp_path, [f"{number:02}.png" for number in range(31)])
    of_files = steps(TorchvisionLoader(ImageFolder(tmp_path), POLICY, 5, seed=3), 8)
    assert_same(steps(TorchvisionLoader(open_own(MyDataset()), POLICY, 5, seed=3), 8), of_files)
    paths = sorted(map(str, tmp_path.iterdir()))
    assert_same(steps(TorchvisionLoader(open_own(paths), POLICY, 5, seed=3), 8), of_files)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_continues_exactly(workers):
    whole = steps(TorchvisionLoader(open_own(MyDataset()), POLICY, 5), 9)
    first = TorchvisionLoader(open_own(MyDataset()), POLICY, 5, workers=workers)
    before, state = steps(first, 4), json.loads(json.dumps(first.state_dict()))
    first.close()
    second = TorchvisionLoader(open_own(MyDataset()), POLICY, 5, workers=workers)
    second.load_state_dict(state)
    after = steps(second, 5)
    second.close()
    assert_same(before + after, whole)


def test_another_data_set_is_refused_when_a_run_resumes():
    state = TorchvisionLoader(open_own(MyDataset()), POLICY, 5).state_dict()
    with pytest.raises(ValueError, match="same data in the same order, got fingerprint="):
        TorchvisionLoader(open_own(MyDataset(first=1)), POLICY, 5).load_state_dict(state)
    with pytest.raises(ValueError, match="same data in the same order, got dataset_size=30"):
        TorchvisionLoader(open_own(MyDataset(30)), POLICY, 5).load_state_dict(state)


def test_a_fingerprint_follows_class_length_and_items():
    class Other(MyDataset):
        pass

    sets = [MyDataset(), MyDataset(30), MyDataset(first=1), MyDataset(bad=(0,)), Other()]
    assert len({open_own(dataset).fingerprint for dataset in sets}) == len(sets)
    assert open_own(MyDataset()).fingerprint == open_own(MyDataset()).fingerprint


@pytest.mark.parametrize("name", ["fingerprint", "_fingerprint"])
def test_a_fingerprint_of_its_own_saves_reading_items(name):
    class Unread(MyDataset):
        def __getitem__(self, index):
            raise AssertionError

    sets = [Unread(), Unread(), Unread()]
    for dataset, text in zip(sets, ("one", "one", "two"), strict=True):
        setattr(dataset, name, text)
    one, same, other = (open_own(dataset).fingerprint for dataset in sets)
    assert one == same != other


def test_items_that_change_are_said_and_leave_the_fingerprint_out():
    class Random(MyDataset):
        def __getitem__(self, index):
            return np.random.default_rng().integers(0, 256, (9, 9, 3), dtype=np.uint8)

    with pytest.warns(
        UserWarning, match="Random: its items change from reading to reading.*leave random transforms out"
    ):
        one = open_own(Random())
    with pytest.warns(UserWarning, match="items change"):
        assert open_own(Random()).fingerprint == one.fingerprint


NAMES = ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("attributes", "labels", "classes"),
    [
        ({"targets": [0, 1, 2, 0, 1, 2], "classes": list(NAMES)}, [0, 1, 2, 0, 1, 2], NAMES),
        ({"labels": torch.tensor([2, 2, 0, 0, 1, 1]), "classes": NAMES}, [2, 2, 0, 0, 1, 1], NAMES),
        ({"targets": np.array([5, 9, 5, 9, 9, 9])}, [0, 1, 0, 1, 1, 1], ("5", "9")),
        ({"labels": ["bee", "ant", "bee", "ant", "ant", "ant"]}, [1, 0, 1, 0, 0, 0], ("ant", "bee")),
        ({"targets": [0, 3, 0, 3, 3, 3], "classes": NAMES}, [0, 1, 0, 1, 1, 1], ("0", "3")),
        ({}, None, ()),
        ({"targets": [0, 1]}, None, ()),
        ({"labels": lambda: 3}, None, ()),
    ],
)
def test_labels_come_from_attributes(attributes, labels, classes):
    source = open_own(with_attributes(**attributes))
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.classes == classes
    assert labels is None or source.labels.dtype == np.int64


@pytest.mark.parametrize("targets", [[-1] * 6, [0.5] * 6, [[0, 1]] * 6, [[0], [1, 2], [], [], [], []]])
def test_labels_that_are_no_classes_are_said(targets):
    with pytest.warns(UserWarning, match="MyDataset: no classes are used, as it has no labels that are whole numbers"):
        assert open_own(with_attributes(targets=targets)).labels is None


def test_a_part_has_the_labels_of_the_whole():
    part = open_own(Subset(with_attributes(targets=[0, 1, 2, 0, 1, 2], classes=NAMES), [4, 0, 2]))
    assert (part.labels.tolist(), part.classes) == ([1, 0, 2], NAMES)
    assert np.array_equal(part.read(0), picture(4))


def test_an_item_that_raises_is_replaced_counted_and_named():
    loader = TorchvisionLoader(open_own(MyDataset(12, bad=(3, 7))), POLICY, 6, most_bad=0.5)
    with pytest.warns(UserWarning, match=r"item 3 of MyDataset cannot be read \(OSError: broken data stream\)"):
        ids = torch.cat([next(loader).ids for _ in range(2)])
    assert loader.replaced == 2
    assert not {3, 7} & set(ids.tolist())


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_too_many_items_that_raise_end_the_run():
    loader = TorchvisionLoader(open_own(MyDataset(12, bad=(3, 7))), POLICY, 12, most_bad=0.1)
    with pytest.raises(RuntimeError, match=r"at most 10.00% of 12 images may be unreadable, got 2"):
        next(loader)


class Mixed(MyDataset):
    """Item 5 is no image; it is not among those of the fingerprint."""

    def __getitem__(self, index):
        return None if index == 5 else super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_of_another_kind_ends_the_run_and_is_named(workers):
    loader = TorchvisionLoader(open_own(Mixed(30)), POLICY, 30, workers=workers)
    with pytest.raises(ValueError, match=r"item 5 of Mixed must be .*, got nothing; raise an error for an image"):
        next(loader)
    loader.close()
    with pytest.raises(ValueError, match=r"item 0 of list must be .* float64; give values"):
        open_own([picture(0) / 255])


def test_what_has_numbers_is_a_source_and_what_is_iterable_a_stream():
    class Endless(IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([])

    pictures = [picture(number) for number in range(3)]
    same_size = np.stack([picture(0)] * 3)
    tensors = TensorDataset(torch.from_numpy(same_size).permute(0, 3, 1, 2), torch.arange(3))
    for numbered in (pictures, tuple(pictures), same_size, tensors):
        assert isinstance(open_own(numbered), DatasetSource)
    for iterable in (Endless(), iter(pictures), (p for p in pictures), set(), DataLoader(MyDataset(), batch_size=None)):
        assert isinstance(open_own(iterable), ImageStream)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        ("my/images", "got 'my/images'; give a path as Data.path"),
        ({"train": [], "test": []}, "got a dict with train, test; take one of its parts"),
        (DataLoader(MyDataset(), batch_size=4), "got a DataLoader, whose items are batches; pass its data set"),
        (open_own, "got the function open_own; pass what it returns"),
        (17, r"got one int; give it len\(data\) and data\[number\], or iteration"),
        ([], "list: at least one image is needed, got none; pass"),
    ],
)
def test_what_is_no_data_set_is_named(images, got):
    with pytest.raises(ValueError, match=got):
        open_own(images)


MINE = """
import datasets_alone
import numpy as np

class Pictures(list):
    pass

def images():
    found = Pictures(np.full((12, 10, 3), 20 * number, np.uint8) for number in range(8))
    found[3] = b"no image"
    return found

def labeled(first=0):
    found = Pictures(np.full((12, 10, 3), first + 20 * number, np.uint8) for number in range(8))
    found.targets, found.classes = [number % 2 for number in range(8)], ["even", "odd"]
    return found

def both():
    return {"train": labeled(), "validation": labeled(9)}

def stream():
    return iter(images())
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file whose own name is that of a module which it imports."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "datasets_alone.py").write_text("HERE = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    path = tmp_path / "datasets_alone.py"
    path.write_text(MINE)
    return path


def test_a_function_of_a_file_is_a_path(mine):
    source = open_source(f"{mine}:images", most_pixels=100)
    assert (len(source), source.name(5), source.most_pixels) == (8, "item 5 of Pictures", 100)
    assert isinstance(open_images(f"{mine}:stream"), ImageStream)
    with pytest.raises(ValueError, match=r"must have numbers here, got .*:stream, which returns an iterable; return"):
        open_source(f"{mine}:stream")
    with pytest.raises(FileNotFoundError, match=r"A data set's file must exist, got .*none.py; check"):
        open_source(mine.with_name("none.py:images"))


def test_bad_items_are_listed_by_check_data(mine, tmp_path):
    result = check_images(open_source(f"{mine}:images"), tmp_path / "out", workers=4)
    assert [bad.index for bad in result.bad] == [3]
    assert result.clean is None
    assert result.report.read_text() == "item 3 of Pictures\tValueError: the file is no image that Pillow knows\n"


def test_labeled_parts_for_evaluations(mine):
    data = open_labeled(f"{mine}:both")
    assert (len(data.train), len(data.test), data.train.classes) == (8, 8, ("even", "odd"))
    assert data.test.labels.tolist() == [0, 1] * 4
    assert data.test.read(1)[0, 0, 0] == 29
    for name, got in (("images", "a dict of data sets with train, got Pictures"), ("none", "got none; name one of")):
        with pytest.raises(ValueError, match=got):
            open_labeled(f"{mine}:{name}")
