"""Damaged shards: what is found lies inside the file and can be read; damage to one header loses its member only."""

import io
import tarfile
import warnings

import numpy as np
import pytest
from fuzz.mutations import limits, mutated, with_tar_checksums
from fuzz.rounds import fuzz

from patchlight.data.shards import TarShards

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def shard(kind: int, rng: np.random.Generator, long_names: bool) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=kind) as tar:
        for number in range(4):
            stem = ("x" * 150 if long_names else "é" if kind == tarfile.PAX_FORMAT else "x") + f"/{number}"
            for ending, content in (("png", rng.bytes(int(rng.integers(0, 1500)))), ("cls", b"%d" % number)):
                entry = tarfile.TarInfo(f"{stem}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return data.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_found_in_a_damaged_shard_can_be_read(tmp_path, kind):
    path = tmp_path / "a.tar"

    def attempt(rng: np.random.Generator) -> None:
        data = mutated(shard(FORMATS[kind], rng, long_names=kind != "ustar"), rng)
        data = with_tar_checksums(data) if rng.random() < 0.7 else data
        path.write_bytes(data)
        try:
            with limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = TarShards(path)
        except (FileNotFoundError, ValueError) as error:
            if "TarShards: " not in str(error):
                raise
            return
        assert len(source) <= 8
        for index in range(len(source)):
            offset, size = (int(number) for number in source.row(index)[1:3])
            assert source.encoded(index) == data[offset : offset + size]
            assert len(source.encoded(index)) == size

    assert fuzz(attempt) >= 1


def test_damage_to_one_header_loses_its_member_only(tmp_path):
    path = tmp_path / "a.tar"

    def attempt(rng: np.random.Generator) -> None:
        data = shard(tarfile.USTAR_FORMAT, rng, long_names=False)
        path.write_bytes(data)
        whole = TarShards(path)
        assert whole.labels.tolist() == [0, 1, 2, 3]
        lost = int(rng.integers(1, 4))  # a shard whose first header is damaged is none
        begins = int(whole.row(lost)[1]) - tarfile.BLOCKSIZE
        path.write_bytes(data[:begins] + rng.bytes(tarfile.BLOCKSIZE) + data[begins + tarfile.BLOCKSIZE :])
        with pytest.warns(UserWarning, match="is damaged"):
            source = TarShards(path)
        assert source.names == [name for index, name in enumerate(whole.names) if index != lost]
        assert source.labels.tolist() == [0, 1, 2]

    assert fuzz(attempt) >= 1
