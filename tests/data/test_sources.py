"""Folders and lists of images: order, labels, odd files."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from data.pictures import picture, write_pictures
from PIL import Image

from patchlight.data import stored
from patchlight.data.sources import FileList, ImageFolder, open_source
from patchlight.data.stored import decode


def test_a_nested_folder_is_read_in_sorted_order(tmp_path):
    write_pictures(tmp_path, ["b/y.png", "a/z/2.PNG", "a/10.jpeg", "a/2.bmp", "c.d/e.webp"])
    source = ImageFolder(tmp_path)
    assert source.names == ["a/10.jpeg", "a/2.bmp", "a/z/2.PNG", "b/y.png", "c.d/e.webp"]
    assert source.classes == ("a", "b", "c.d")
    assert source.labels.tolist() == [0, 0, 0, 1, 2]
    assert np.array_equal(source.read(3), picture(0))
    assert len(source) == 5
    assert source.name(3).endswith("b/y.png")


def test_images_at_the_top_mean_that_there_are_no_labels(tmp_path):
    write_pictures(tmp_path, ["a/1.png", "2.png"])
    source = open_source(tmp_path)
    assert source.labels is None
    assert source.classes == ()


def test_hidden_files_and_links_in_circles_are_left_alone(tmp_path):
    write_pictures(tmp_path, ["a/1.png", "a/.hidden.png", ".cache/2.png"])
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert ImageFolder(tmp_path).names == ["a/1.png"]


def test_a_linked_folder_is_followed(tmp_path):
    write_pictures(tmp_path, ["elsewhere/1.png", "root/a/2.png"])
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path / "root").names == ["a/2.png", "b/1.png"]


def test_other_files_are_counted_aloud(tmp_path):
    write_pictures(tmp_path, ["a/1.png"])
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.warns(UserWarning, match=r"left out 1 files .* notes.txt"):
        ImageFolder(tmp_path)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder must exist, got .*nowhere"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="got none among 0 files"):
        ImageFolder(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"got none among 1 files .* known endings are \.bmp"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="A folder or a list of images must exist"):
        open_source(tmp_path / "list.txt")


def test_a_list_gives_order_and_labels(tmp_path):
    write_pictures(tmp_path, ["a.png", "sub/b.png"])
    (tmp_path / "list.txt").write_text("sub/b.png\tdog\n\na.png\tcat\n")
    source = open_source(tmp_path / "list.txt")
    assert source.labels.tolist() == [1, 0]
    assert source.classes == ("cat", "dog")
    assert np.array_equal(source.read(0), picture(1))
    (tmp_path / "plain.txt").write_text(f"{tmp_path}/a.png\n")
    assert FileList(tmp_path / "plain.txt").labels is None
    (tmp_path / "mixed.txt").write_text("a.png\tcat\nsub/b.png\n")
    with pytest.raises(ValueError, match="got a mixture"):
        FileList(tmp_path / "mixed.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="at least one line"):
        FileList(tmp_path / "empty.txt")


def test_fingerprints_tell_data_apart(tmp_path):
    write_pictures(tmp_path, ["x/1.png", "y/1.png", "z/1.png", "z/2.png"])
    one, two, three = (ImageFolder(tmp_path / name).fingerprint for name in "xyz")
    assert one == two, "the same names elsewhere are the same data"
    assert one != three


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("L", "LA", "RGBA", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.fromarray(picture(0)).convert(mode).save(path)
        image = decode(path.read_bytes())
        assert image.dtype == np.uint8, mode
        assert image.shape == picture(0).shape, mode


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = decode((tmp_path / "deep.png").read_bytes())
    assert np.array_equal(image[:, :, 0], values >> 8)
    assert (image == image[:, :, :1]).all()


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    """The pixels of these images are missing: they were not looked for."""
    for name, size in {"a.png": (9000, 9000), "b.png": (15_000, 15_000), "c.png": (50, 50)}.items():
        chunks = (b"IHDR", struct.pack(">II5B", *size, 8, 2, 0, 0, 0)), (b"IDAT", b"")
        parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(tmp_path)
        with pytest.raises(ValueError, match="9000 x 9000 pixels; 1 to 67108864 are read"):
            source.read(0)
        with pytest.raises(ValueError, match="more than 67108864 pixels, the most that are read"):
            source.read(1)
        with pytest.raises(ValueError, match="50 x 50 pixels; 1 to 2499 are read"):
            open_source(tmp_path, most_pixels=2499).read(2)
        Image.new("RGB", (50, 50)).save(tmp_path / "c.png")
        assert open_source(tmp_path, most_pixels=2500).read(2).shape == (50, 50, 3)


def test_a_large_image_is_converted_in_parts_to_the_same_pixels(monkeypatch):
    monkeypatch.setattr(stored, "_STRIP", 1000)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (123, 77, 3), dtype=np.uint8))
    for mode in ("RGB", "L", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "1"):
        data = io.BytesIO()
        changed = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
        changed.save(data, "TIFF" if mode in ("CMYK", "YCbCr", "PA") else "PNG")
        with Image.open(io.BytesIO(data.getvalue())) as whole:
            assert np.array_equal(decode(data.getvalue()), np.array(whole.convert("RGB"))), mode


def test_what_is_no_file_of_an_image_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with open(tmp_path / "vast.png", "wb") as file:
        file.truncate(2**40)
    source = ImageFolder(tmp_path)
    reasons = {
        "pipe": "no regular file",
        "endless": "no regular file",
        "script": "no image",
        "vast": "1099511627776 bytes",
    }
    for index, name in enumerate(source.names):
        with pytest.raises((OSError, ValueError), match=reasons[name.removesuffix(".png")]):
            source.read(index)
