"""Files that change under the same names are named: at the start of an epoch, and when a run is resumed."""

import os
import warnings

import pytest
from data.pictures import write_pictures, write_shards

from patchlight.data.contents import MOST_FILES, describe_changes, look_at
from patchlight.data.policy import dino_policy
from patchlight.data.sources import open_source
from patchlight.data.torchvision_loader import TorchvisionLoader

POLICY = dino_policy(0, 24)
NAMES = [f"{number}.png" for number in range(8)]


def build(path) -> TorchvisionLoader:
    return TorchvisionLoader(open_source(path), POLICY, 4)


def touch(path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 5))


def test_a_file_that_is_replaced_is_named_at_the_start_of_the_next_epoch(tmp_path):
    write_pictures(tmp_path, NAMES)
    loader = build(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(loader)
        (tmp_path / "5.png").write_bytes((tmp_path / "6.png").read_bytes() + b"more")
        touch(tmp_path / "2.png")
        next(loader)
    message = r"1 have another size and 1 the same size but another time, such as .*5.png. Training goes on with what"
    with pytest.warns(UserWarning, match=f"of 8 files that were looked at, {message}"):
        next(loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(loader), next(loader)  # once is enough


@pytest.mark.parametrize("shards", [False, True])
def test_a_resumed_run_names_what_changed_since(tmp_path, shards):
    if shards:
        write_shards(tmp_path, [4, 4])
    else:
        write_pictures(tmp_path, NAMES)
    first = build(tmp_path)
    next(first)
    state = first.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path).load_state_dict(state)
    file = max(tmp_path.glob("*.tar" if shards else "*.png"))
    touch(file)
    message = (
        f"of {2 if shards else 8} files that were looked at, 0 have another size and 1 the same size .*{file.name}"
    )
    with pytest.warns(UserWarning, match=f"not what they were when the run that is resumed looked at them: {message}"):
        build(tmp_path).load_state_dict(state)


def test_a_file_that_is_gone_has_changed(tmp_path):
    write_pictures(tmp_path, NAMES)
    files = [tmp_path / name for name in NAMES]
    before = look_at(files)
    assert not describe_changes(before.state(), look_at(files), files)
    files[3].unlink()
    assert "1 have another size" in describe_changes(before.state(), look_at(files), files)


def test_of_many_files_the_same_sample_is_looked_at(tmp_path):
    write_pictures(tmp_path, ["a.png", "b.png"])
    files = [tmp_path / "a.png"] * (10 * MOST_FILES)
    before = look_at(files)
    assert 0.9 * MOST_FILES < len(before.numbers) <= MOST_FILES
    changed = [tmp_path / "b.png" if number % 100 == 0 else file for number, file in enumerate(files)]
    now = look_at(changed)
    found = describe_changes(before.state(), now, changed)
    touched = (now.numbers % 100 == 0).sum()
    assert f"of {len(now.numbers)} files" in found
    assert f"{touched} have another size" in found
    assert len(str(before.state())) < 25_000, "small enough for a checkpoint's facts"
