"""Tar shards: every sample by its number, the index that a check writes, damage."""

import io
import tarfile

import numpy as np
import pytest
from data.pictures import picture, write_shards
from PIL import Image

from patchlight.data.check_data import check_images
from patchlight.data.shards import TarShards
from patchlight.data.sources import open_source


def test_every_sample_has_a_number(tmp_path):
    pictures = write_shards(tmp_path, [3, 1, 4])
    source = open_source(tmp_path)
    assert isinstance(source, TarShards)
    assert len(source) == 8
    for index in (7, 0, 3, 4, 2):  # in any order
        assert np.array_equal(source.read(index), pictures[index])
    assert source.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert source.classes == ("0", "1", "2")
    assert "train-002.tar (002/00000.png at byte" in source.name(4)
    one = open_source(tmp_path / "train-002.tar")
    assert np.array_equal(one.read(1), pictures[5])
    assert one.fingerprint != source.fingerprint


def test_an_index_of_the_good_samples_is_read_back(tmp_path):
    pictures = write_shards(tmp_path / "shards", [2, 3])
    source = open_source(tmp_path / "shards")
    shard = tmp_path / "shards" / "train-001.tar"
    data = bytearray(shard.read_bytes())
    offset = int(source.row(3)[1])
    data[offset : offset + 8] = b"no image"
    shard.write_bytes(data)
    result = check_images(source, tmp_path / "out", workers=2)
    assert [bad.index for bad in result.bad] == [3]
    clean = open_source(result.clean)
    assert isinstance(clean, TarShards)
    assert clean.labels.tolist() == [0, 1, 0, 2]
    for index, number in enumerate((0, 1, 2, 4)):
        assert np.array_equal(clean.read(index), pictures[number])
    assert clean.fingerprint != source.fingerprint


def test_a_shard_that_ends_early_keeps_what_came_before(tmp_path):
    pictures = write_shards(tmp_path, [2, 3])
    shard = tmp_path / "train-001.tar"
    whole = open_source(tmp_path)
    end = int(whole.row(4)[1]) + 1000  # in the last picture
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(OSError, match=r"ends early: 1000 of \d+ bytes"):
        whole.read(4)
    with pytest.warns(UserWarning, match=r"train-001.tar is damaged: .*; 2 images of it are used"):
        source = open_source(tmp_path)
    assert np.array_equal(source.read(3), pictures[3])


def test_wrong_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must exist, got .*nowhere.tar"):
        open_source(tmp_path / "nowhere.tar")
    with pytest.raises(FileNotFoundError, match="index must exist"):
        open_source(tmp_path / "nowhere.index")
    (tmp_path / "wrong.index").write_text("a.tar\t512\n")
    with pytest.raises(ValueError, match=r"shard, offset, size, name .* got something else"):
        open_source(tmp_path / "wrong.index")
    write_shards(tmp_path / "none", [0])
    with pytest.raises(FileNotFoundError, match="at least one image is needed"):
        open_source(tmp_path / "none")


def add(tar: tarfile.TarFile, name: str, content: bytes, size: int | None = None, padded: bool = True) -> int:
    """Adds a member that says it has another size; where its header begins."""
    entry, place = tarfile.TarInfo(name), tar.offset
    entry.size = len(content) if size is None else size
    header = entry.tobuf(tarfile.GNU_FORMAT)
    tar.fileobj.write(header + content + bytes(-len(content) % 512 if padded else 0))
    tar.offset += len(header) + len(content) + (-len(content) % 512 if padded else 0)
    return place


def shard_of(path, members: list[tuple]) -> list[int]:
    with tarfile.open(path, "w") as tar:
        return [add(tar, *member) for member in members]


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture(number)).save(data, "PNG")
    return data.getvalue()


TIB = 2**40


@pytest.mark.parametrize(
    ("name", "content", "size", "reason"),
    [
        ("1.cls", b"x", TIB, "'1.cls' says that it has 1099511627776 bytes"),
        ("1.cls", b"\xff\xfe", None, "'1.cls' is no UTF-8"),
        ("1.cls", bytes(10_000), None, "'1.cls' has 10000 bytes, too many for a class"),
        ("extra.png", b"x", TIB, "'extra.png' says that it has 1099511627776 bytes"),
        ("extra.json", b"x", TIB, "a header that cannot be read"),
        ("extra.png", b"x", -512, "a size below zero"),
        ("extra.json", b"x", -TIB, "a size below zero"),
    ],
)
def test_a_member_that_lies_is_named_and_the_rest_is_used(tmp_path, name, content, size, reason):
    images = [(f"{number}.png", png(number)) for number in range(4)]
    shard_of(tmp_path / "a.tar", [*images[:2], (name, content, size), *images[2:]])
    with pytest.warns(UserWarning, match="a.tar is damaged: ") as warned:
        source = TarShards(tmp_path)
    assert len(warned) == 1
    assert reason in str(warned[0].message)
    left = [0, 2, 3] if name == "1.cls" else [0, 1, 2, 3]  # without the image whose class is unknown
    assert source.names == [f"a.tar/{number}.png" for number in left]
    assert f"{len(left)} images of it are used" in str(warned[0].message)
    for index, number in enumerate(left):
        assert np.array_equal(source.read(index), picture(number))


@pytest.mark.parametrize("damage", [bytes(512)[:-1] + b"x", b"\xff" * 512])
def test_after_a_damaged_header_the_next_members_are_read(tmp_path, damage):
    places = shard_of(tmp_path / "a.tar", [(f"{number}.png", png(number)) for number in range(4)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[places[1] : places[1] + 512] = damage
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.warns(
        UserWarning, match=f"a damaged header at byte {places[1]}, read on at byte {places[2]}; 3 images"
    ):
        source = TarShards(tmp_path)
    assert source.names == [f"a.tar/{number}.png" for number in (0, 2, 3)]
    assert np.array_equal(source.read(1), picture(2))


def test_a_shard_without_its_end_is_named(tmp_path):
    places = shard_of(tmp_path / "a.tar", [(f"{number}.png", png(number)) for number in range(2)])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: places[1]])
    with pytest.warns(UserWarning, match="no mark of the end, as if it were cut off .*; 1 images of it are used"):
        TarShards(tmp_path)


def test_a_long_name_that_lies_about_its_length_takes_no_memory(tmp_path):
    """A header of the kind "long name" of 1 TiB, before an image."""
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, TIB
    shard_of(tmp_path / "a.tar", [("0.png", png(0))])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + whole)
    with pytest.warns(UserWarning, match="is damaged"):
        source = TarShards(tmp_path)
    assert np.array_equal(source.read(0), picture(0))


def test_classes_of_some_images_only_are_left_out_aloud(tmp_path):
    shard_of(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"7"), ("1.png", png(1))])
    with pytest.warns(UserWarning, match="no classes are used, as 1 of 2 images in .* have none"):
        assert TarShards(tmp_path).labels is None


def test_an_index_that_lies_about_a_size_is_named(tmp_path):
    shard_of(tmp_path / "a.tar", [("0.png", png(0))])
    (tmp_path / "a.index").write_text(f"a.tar\t512\t{TIB}\t0.png\na.tar\t{TIB}\t100\t1.png\na.tar\t512\t20000\t2.png\n")
    source = open_source(tmp_path / "a.index")
    with pytest.raises(ValueError, match="it has 1099511627776 bytes, where an image of 67108864 pixels"):
        source.read(0)
    for index in (1, 2):
        with pytest.raises(OSError, match="the file ends early"):
            source.read(index)
    (tmp_path / "a.index").write_text("a.tar\t-512\t10\t0.png\n")
    with pytest.raises(ValueError, match="every line of an index must be"):
        open_source(tmp_path / "a.index")
