"""Labeled data as it is downloaded: readers give what the writers of procedural data wrote, damage is one sentence, and no file
is executed."""

import base64
import contextlib
import json
import os
import pickle
import shutil
import zlib

import numpy as np
import pytest
from parity import SEED
from PIL import Image

from patchlight.data.procedural import CLASSES, ProceduralSource
from patchlight.evaluation.layouts.labeled import (
    write_cars,
    write_cifar10,
    write_cifar100,
    write_flowers102,
    write_folder,
    write_inat2019,
)
from patchlight.evaluation.layouts.mat_file import read_mat, write_mat
from patchlight.evaluation.probes.labeled import LAYOUTS, open_labeled

WRITERS = {
    "folder": write_folder,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "flowers102": write_flowers102,
    "cars": write_cars,
    "inat2019": write_inat2019,
}
# Written by scipy 1.17.1: savemat(..., do_compression=True) of a struct array "annotations" of three (bbox_x1 0, 300, 600;
# class 1, 2, 3; fname 00001.jpg ...), a cell array "class_names", "labels" 1.0 to 7.0, "m" int32 [2, 3], and "big" [2.5, -1e300].
SCIPY = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjkgMDA6MzQ6MjkgMjAyNgAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAlQAAAHic42NgYOhgYmBgA9Ic"
    "QAxkggErlM8IxMxQmhuIE/Py8ksSSzLz84qh6ljg6iSAOCkpvyK+wpAhOSexGKQiLS8xNxVI8wGxAQPCHk4s9sAwA9gdEBY5+hih"
    "+hyQ9LFg0ceJpE8AyjcAAkO9rIJ0qDi6/dwE7GcBukCHkTx3M1HobiMK3R3BRJ67mSl0tzGSuwEMKxhLDwAAAG4AAAB4nONjAAJG"
    "BgY2IMUBYYIBKxKfGUpzA3FyTmJxcXxeYm5qMVgdHxB7MCD0s2DRL4ZkrgCU7+ir4J6al1qUmKPgUZqbm1qkYGRgYAAxz4KAeaxo"
    "5oHUHm5RSE4sgug3IKCfEUU/I0MFkAYA9aQQXA8AAABAAAAAeJzjY2BgKABiNiDmgNIgwArlMwIxO5QGyeUkJqXmFDMwcALZFgww"
    "8MEeynCAUBxQWgBKi0BpCSgt4wAAZOcGcg8AAAAwAAAAeJzjY2Bg8ABiNiDmAGIeBghghfKZgJgZiBmBMBcqLgFVAxFnYGCBqgPJ"
    "AQA3/gEeDwAAADMAAAB4nONjYGBwAGI2IOaA0iDACuUzAjETmGZmSMpMZ+AEsgUYYIDFYU4pQ4fNE/N/AFGmBfQ="
)


def test_every_layout_has_a_writer():
    assert set(WRITERS) == set(LAYOUTS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small data set in each layout, in folders with spaces."""
    place = tmp_path_factory.mktemp("all data")
    return {layout: write(place / f"my {layout}", 40, 32, SEED) for layout, write in WRITERS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_is_read(written, layout):
    data = open_labeled(str(written[layout]), layout=layout)
    assert (data.name, data.class_count, data.whole) == (str(written[layout]), 10, False)
    for part, source in ((data.train, ProceduralSource(40, 32, SEED)), (data.test, ProceduralSource(10, 32, SEED + 1))):
        assert len(part) == len(source)
        if layout == "flowers102" and part is data.train:  # half of them are of another part, which follows
            order = [*range(0, 40, 2), *range(1, 40, 2)]
        elif layout == "folder":  # by names of classes
            order = sorted(range(len(source)), key=lambda i: (CLASSES[source.labels[i]].replace(" ", "_"), i))
        else:
            order = list(range(len(source)))
        exact = layout.startswith("cifar") or layout == "folder"  # the others are JPEGs
        for row, number in enumerate(order):
            pixels = part.read(row).astype(int)
            assert pixels.shape == (32, 32, 3)
            assert abs(pixels - source.images[number]).mean() <= (0 if exact else 8), part.name(row)
            name, right = part.classes[part.labels[row]], source.labels[number]
            assert name.replace("_", " ") == (str(right + 1) if layout == "flowers102" else CLASSES[right])


def test_other_libraries_put_a_folder_around(written, tmp_path):
    (tmp_path / "a").mkdir()
    for layout, folder in (("flowers102", "flowers-102"), ("cars", "stanford_cars")):
        (tmp_path / folder).symlink_to(written[layout])
        assert len(open_labeled(str(tmp_path), layout=layout).train) == 40
    inner = written["cifar10"] / "cifar-10-batches-bin"
    assert len(open_labeled(str(inner), layout="cifar10").train) == 40
    moved = shutil.copytree(written["cars"], tmp_path / "cars")
    (moved / "cars_test_annos_withlabels.mat").rename(moved / "devkit/cars_test_annos_withlabels.mat")
    assert len(open_labeled(str(moved), layout="cars").test) == 10


def as_python(root, classes: int, protocol: int = 2):
    """The files for Python that hold the same as the binary ones."""
    folder = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    folder.mkdir()
    (binary,) = root.glob("*bin*")
    for path in binary.glob("*.bin"):
        rows = np.fromfile(path, np.uint8).reshape(-1, 3072 + (1 if classes == 10 else 2))
        key = "labels" if classes == 10 else "fine_labels"
        content = {"data": rows[:, -3072:].copy(), key: rows[:, -3073].tolist(), "filenames": ["x"]}
        (folder / path.stem).write_bytes(pickle.dumps(content, protocol))
    names = {"label_names" if classes == 10 else "fine_label_names": list(CLASSES)}
    (folder / ("batches.meta" if classes == 10 else "meta")).write_bytes(pickle.dumps(names, protocol))
    shutil.rmtree(binary)
    return folder


@pytest.mark.parametrize("classes", [10, 100])
def test_the_files_for_python_hold_the_same(written, tmp_path, classes):
    layout = f"cifar{classes}"
    root = shutil.copytree(written[layout], tmp_path / "copy")
    as_python(root, classes)
    data, other = (open_labeled(str(path), layout=layout) for path in (root, written[layout]))
    for part, same in ((data.train, other.train), (data.test, other.test)):
        assert part.classes == same.classes
        assert np.array_equal(part.labels, same.labels)
        assert all(np.array_equal(part.read(i), same.read(i)) for i in range(len(part)))


def test_a_pickle_of_python_2_is_read(written, tmp_path):
    """As the originals were made: texts are bytes (U), and numpy's module has its old name."""
    root = shutil.copytree(written["cifar10"], tmp_path / "copy")
    folder = as_python(root, 10)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n(I2\nI3072\nt"
    array += b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntb" + b"I00\n"
    pixels = np.random.default_rng(SEED).integers(0, 256, 6144).astype(np.uint8)
    array += b"T" + (6144).to_bytes(4, "little") + pixels.tobytes() + b"tb"
    (folder / "data_batch_2").write_bytes(b"(dU\x04data" + array + b"sU\x06labels(lI4\naI9\nas.")
    train = open_labeled(str(root), layout="cifar10").train
    assert train.labels[8:10].tolist() == [4, 9], "after the eight images of the first file"
    assert np.array_equal(train.read(9), pixels[3072:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert train.name(9) == f"image 1 of {folder / 'data_batch_2'}"


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("place", ["data", "labels", "other"])
def test_a_pickle_with_code_is_refused_and_not_executed(written, tmp_path, place):
    root = shutil.copytree(written["cifar10"], tmp_path / "copy")
    folder, made = as_python(root, 10), tmp_path / "made"
    content = pickle.loads((folder / "test_batch").read_bytes()) | {place: Evil(made)}
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"whole, as it was .*test_batch \(it names posix.mkdir, which is neither"):
        open_labeled(str(root), layout="cifar10")
    assert not made.exists()
    pickle.loads(pickle.dumps(Evil(made)))
    assert made.exists(), "the pickle does what it should not"


def change_pickle(**values):
    def change(path):
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | values, 2))

    return change


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("test_batch", lambda path: path.write_bytes(path.read_bytes()[:-9]), r"test_batch \(.*"),
        ("test_batch", lambda path: path.write_bytes(b"[1, 2]"), r"test_batch \("),
        ("test_batch", lambda path: path.write_bytes(pickle.dumps([1])), r"test_batch \('list' object"),
        ("data_batch_3", change_pickle(labels=[1, 2]), r"data_batch_3 \(2 labels of 8 images"),
        ("data_batch_3", change_pickle(labels=[1, -2]), r"data_batch_3 \(no list labels of numbers"),
        ("data_batch_3", change_pickle(data=np.zeros((8, 3072), np.float32)), "an array that is not of uint8 by rows"),
        ("data_batch_3", change_pickle(data=np.zeros((8, 3071), np.uint8)), r"no data \[n, 3072\]"),
        ("data_batch_3", change_pickle(data=None), r"no data \[n, 3072\]"),
        ("batches.meta", change_pickle(label_names=3), "no list label_names"),
        ("batches.meta", change_pickle(label_names=["a"] * 9), r"number of a class, got \[9\] of 9"),
    ],
)
def test_a_damaged_file_for_python_is_named(written, tmp_path, file, change, sentence):
    root = shutil.copytree(written["cifar10"], tmp_path / "copy")
    change(as_python(root, 10) / file)
    with pytest.raises(ValueError, match=sentence):
        open_labeled(str(root), layout="cifar10")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def without(name):
    def change(path):
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))

    return change


def twice(path):
    content = json.loads(path.read_text())
    content["annotations"].append(content["annotations"][0])
    path.write_text(json.dumps(content))


def stranger(path):
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(content))


def only_one_class(path):
    records = np.fromfile(path, np.uint8).reshape(-1, 3073)
    records[:, 0] = 3
    records.tofile(path)


FLOWER_LABELS = {"labels": np.ones((1, 50), np.uint8)}


@pytest.mark.parametrize(
    ("layout", "file", "change", "sentence"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_4.bin", cut, r"got .*data_batch_4.bin \(24575 bytes where an image"),
        ("cifar10", "cifar-10-batches-bin/test_batch.bin", only_one_class, "9 without one in .*, such as 'disk'"),
        ("cifar10", "cifar-10-batches-bin/test_batch.bin", lambda p: p.unlink(), "neither test_batch.bin nor test_batch"),
        ("cifar100", "cifar-100-binary/train.bin", lambda p: p.write_bytes(b""), "0 bytes where an image has 3074"),
        ("cifar100", "cifar-100-binary/fine_label_names.txt", lambda p: p.write_text("a\n"), r"a class, got \[1\] of 1"),
        ("flowers102", "setid.mat", cut, r"whole and of MATLAB's .*setid.mat \("),
        ("flowers102", "setid.mat", lambda p: p.write_bytes(b"x" * 300), "no header of such a file"),
        ("flowers102", "setid.mat", lambda p: write_mat(p, {"trnid": np.array([[1]], np.uint8)}), "whole numbers valid"),
        ("flowers102", "imagelabels.mat", lambda p: write_mat(p, {"labels": np.ones((1, 9), np.uint8)}), "got 40 of 9"),
        ("flowers102", "imagelabels.mat", lambda p: write_mat(p, {"labels": "text"}), "whole numbers labels, got str"),
        ("flowers102", "imagelabels.mat", lambda p: p.unlink(), "must have jpg, imagelabels.mat.* no imagelabels.mat"),
        ("cars", "cars_test_annos_withlabels.mat", lambda p: p.unlink(), "need their classes, got no cars_test_annos_with"),
        ("cars", "devkit/cars_meta.mat", lambda p: write_mat(p, FLOWER_LABELS), "names of the classes, got no class_names"),
        ("cars", "devkit/cars_train_annos.mat", lambda p: write_mat(p, FLOWER_LABELS), "annotations with fname and class"),
        ("cars", "devkit/cars_train_annos.mat", lambda p: write_mat(p, {"annotations": [{"fname": "a.jpg"}]}), "got KeyError"),
        ("inat2019", "train2019.json", without("categories"), "images, annotations and categories, got no 'categories'"),
        ("inat2019", "train2019.json", cut, "got JSONDecodeError"),
        ("inat2019", "val2019.json", twice, "11 annotations of 10 images, where there are 10"),
        ("inat2019", "val2019.json", stranger, r"a category of train2019.json, got category \[77\]"),
    ],
)  # fmt: skip
def test_a_damaged_data_set_is_named(written, tmp_path, layout, file, change, sentence):
    root = shutil.copytree(written[layout], tmp_path / "copy")
    change(root / file)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        open_labeled(str(root), layout=layout)
    assert "; " in str(error.value)
    assert str(error.value).endswith(".")


def test_a_layout_needs_a_folder(tmp_path):
    with pytest.raises(
        ValueError, match="layout cars needs a folder, got 'procedural', which is none; pass the folder"
    ):
        open_labeled("procedural", layout="cars")
    (tmp_path / "mine.txt").write_text("precious")
    for write in WRITERS.values():
        with pytest.raises(ValueError, match="must be new or empty"):
            write(tmp_path, 10, 32, 0)
        with pytest.raises(ValueError, match="training images must be at least 10, got 9"):
            write(tmp_path / "new", 9, 32, 0)


def test_larger_drawings_are_reduced_for_cifar(tmp_path):
    write_cifar100(tmp_path, 10, 64, SEED)
    source = ProceduralSource(10, 64, SEED)
    small = np.asarray(Image.fromarray(source.images[3]).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(open_labeled(str(tmp_path), layout="cifar100").train.read(3), small)


def test_mat_files_of_scipy_are_read(tmp_path):
    (tmp_path / "a.mat").write_bytes(SCIPY)
    found = read_mat(tmp_path / "a.mat")
    rows = [(int(row["bbox_x1"].item()), int(row["class"].item()), row["fname"]) for row in found["annotations"]]
    assert rows == [(0, 1, "00001.jpg"), (300, 2, "00002.jpg"), (600, 3, "00003.jpg")]
    assert found["class_names"] == ["AM General Hummer 2000", "\u00c4 car", "x"]
    assert found["labels"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert found["m"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["big"].tolist() == [[2.5, -1e300]]


def test_mat_files_are_read_back(tmp_path):
    values = {
        "text": "caf\u00e9",
        "cells": ["a", np.arange(6, dtype=np.uint16).reshape(2, 3), ["b"]],
        "records": [{"x": np.array([[1.5]]), "name": "one"}, {"x": np.array([[2.5]]), "name": "two"}],
    }
    write_mat(tmp_path / "a.mat", values)
    found = read_mat(tmp_path / "a.mat")
    assert found["text"] == values["text"]
    assert (found["cells"][0], found["cells"][2]) == ("a", ["b"])
    assert np.array_equal(found["cells"][1], values["cells"][1])
    assert [(row["x"].item(), row["name"]) for row in found["records"]] == [(1.5, "one"), (2.5, "two")]


def test_damaged_mat_files_are_one_sentence(tmp_path):
    random, path, refused = np.random.default_rng(SEED), tmp_path / "a.mat", 0
    write_mat(path, {"cells": ["a", ["b"]], "records": [{"x": np.arange(3.0)[None], "name": "one"}]})
    packed, plain = path.read_bytes(), tmp_path / "plain.mat"
    # The same without compression, so that damage reaches the arrays themselves.
    whole = [packed, SCIPY, packed[:128] + unpacked(packed[128:]), SCIPY[:128] + unpacked(SCIPY[128:])]
    for number in range(400):
        damaged = bytearray(whole[number % 4])
        for place in random.integers(128, len(damaged), 3):
            damaged[place] = random.integers(0, 256)
        plain.write_bytes(damaged[: random.integers(128, len(damaged))] if number % 3 == 0 else damaged)
        with contextlib.suppress(ValueError):
            read_mat(plain)
            refused -= 1  # what is left may be a file
        refused += 1
    assert refused > 100


def unpacked(data: bytes) -> bytes:
    found = b""
    while data:
        size = int.from_bytes(data[4:8], "little")
        found, data = found + zlib.decompress(data[8 : 8 + size]), data[8 + size :]
    return found
