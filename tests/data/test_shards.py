"""Tar shards: every sample by its number, the index that a check writes, damage."""

import numpy as np
import pytest
from data.pictures import write_shards

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
    offset = int(source.line(3).split("\t")[1])
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
    end = int(whole.line(4).split("\t")[1]) + 1000  # in the last picture
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(OSError, match=r"ends early: 1000 of \d+ bytes"):
        whole.read(4)
    with pytest.warns(UserWarning, match=r"train-001.tar is damaged .* its 3 readable images"):
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
