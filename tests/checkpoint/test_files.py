"""The files of a checkpoint: what is written is read, what has changed is named, nothing is executed."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from patchlight.checkpoint import folder
from patchlight.checkpoint.__main__ import check_checkpoint
from patchlight.checkpoint.folder import complete, delete_old, load_tensors, read_facts, set_aside, verify
from patchlight.checkpoint.manifest import MANIFEST, DamagedError, Manifest, NewerFormatError, Piece, checksum
from patchlight.checkpoint.tensors import DTYPES, TensorWriter
from patchlight.durable import write_whole

STATE = {
    "student": {name: torch.arange(-6, 6).reshape(3, 4).to(dtype) for name, dtype in DTYPES.items()},
    "optimizer": {"step": torch.tensor(3.5), "empty": torch.empty(0, 7), "transposed": torch.rand(5, 8).T},
    "[/b] name": {"é\n": torch.rand(2)},
}
FACTS = {"run": {}, "loader": {}, "processes": 1}
FILES = (MANIFEST, "facts.json", "teacher.safetensors", "rank-0000.safetensors")


def save(parent: Path, step: int = 7, keep: int = 5, state: dict = STATE) -> Path:
    """A checkpoint of this process."""
    path = parent / f"step-{step:08d}"
    partial = path.with_suffix(".partial")
    partial.mkdir(parents=True)

    def finish(tensors):
        folder.write_rest(partial, step, FACTS | {"clock": {"step": step}}, {"weight": torch.rand(4, 4)}, tensors)
        folder.publish(partial, path)
        delete_old(parent, keep)

    dcp.save(state, storage_writer=TensorWriter(partial, finish), no_dist=True)
    return path


def blank(state: dict) -> dict:
    return {part: {name: torch.zeros_like(t) for name, t in tensors.items()} for part, tensors in state.items()}


def test_what_is_written_is_read(tmp_path):
    path = save(tmp_path)
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert verify(path) == []
    found = blank(STATE)
    load_tensors(path, found)
    for part, tensors in STATE.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[part][name], tensor), (part, name)
    assert read_facts(path) == FACTS | {"clock": {"step": 7}}


def test_a_part_of_it_is_read(tmp_path):
    path = save(tmp_path)
    found = {"optimizer": {"transposed": torch.zeros(8, 5)}}
    load_tensors(path, found)
    assert torch.equal(found["optimizer"]["transposed"], STATE["optimizer"]["transposed"])


def test_every_file_is_read_by_safetensors_and_has_the_modes_of_this_process(tmp_path):
    path = save(tmp_path)
    found = load_file(path / "rank-0000.safetensors")
    assert torch.equal(found["student.BF16"], STATE["student"]["BF16"])
    plain = tmp_path / "plain"
    plain.touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {plain.stat().st_mode}


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(BaseException, match=r"tensors only, got another object as student.rate"):
        save(tmp_path, state={"student": {"rate": 0.5}})
    assert complete(tmp_path) == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def blank_block(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:10] + bytes(min(4096, len(data) - 10)) + data[10 + 4096 :])


def make_folder_of(file: Path) -> None:
    file.unlink()
    file.mkdir()


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n1")


DAMAGES = {
    "flip": flip,
    "cut": cut,
    "blank": blank_block,
    "delete": Path.unlink,
    "folder": make_folder_of,
    "append": append,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_never_loaded(damage, file, tmp_path):
    path = save(tmp_path)
    DAMAGES[damage](path / file)
    wrong = verify(path)
    assert len(wrong) == 1
    assert file in wrong[0]
    assert str(path) in wrong[0]
    found = blank(STATE)
    try:
        assert read_facts(path) == FACTS | {"clock": {"step": 7}}
        load_tensors(path, found)
    except (DamagedError, OSError):
        return
    assert all(torch.equal(found[part][name], t) for part, tensors in STATE.items() for name, t in tensors.items())


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_checkpoint_is_named(file, tmp_path):
    old, new = save(tmp_path, 7), save(tmp_path, 8)
    if file == "rank-0000.safetensors":
        load = {"student": {"F32": torch.rand(3, 4)}}
        old = save(tmp_path, 6, state=STATE | load)
    shutil.copy(old / file, new / file)
    assert any((file if file != MANIFEST else "the manifest.json of step 7") in line for line in verify(new))


def test_parts_together_verify_all(tmp_path):
    path = save(tmp_path)
    for file in FILES[1:]:
        flip(path / file)
    found = [line for part in range(5) for line in verify(path, part=part, parts=5)]
    assert sorted(found) == sorted(verify(path))
    assert len(found) == 3


def test_names_that_are_no_checkpoints_do_not_count(tmp_path):
    first, second = save(tmp_path, 3), save(tmp_path, 100000007)
    for name in ("step-00000099.bak", "step-abc", "step-00000004.partial", "step-1", "step-00000005.damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007.txt").touch()
    (tmp_path / "step-00000098").symlink_to(tmp_path / "step-00000098")
    assert complete(tmp_path)[:2] == [first, tmp_path / "step-00000098"]
    assert complete(tmp_path)[2] == second
    assert verify(tmp_path / "step-00000098")


def test_nothing_is_unpickled(tmp_path):
    path, ran = save(tmp_path), tmp_path / "ran"

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    for name in (".metadata", *FILES):
        (path / name).write_bytes(pickle.dumps(Command()))
    assert verify(path)
    with pytest.raises(DamagedError):
        load_tensors(path, blank(STATE))
    assert not ran.exists()


def test_the_last_whole_checkpoint_is_never_deleted(tmp_path):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    cut(broken / "rank-0000.safetensors")
    third = save(tmp_path, 3)
    (third / "facts.json").unlink()
    delete_old(tmp_path, keep=1)
    assert [path.name for path in complete(tmp_path)] == ["step-00000001", "step-00000002", "step-00000003"]


def test_damaged_checkpoints_are_kept_under_other_names(tmp_path):
    for name in ("step-00000007.damaged", "step-00000007.damaged1"):
        assert set_aside(save(tmp_path)).name == name
    assert complete(tmp_path) == []


def test_a_newer_format_is_no_damage(tmp_path, monkeypatch):
    path = save(tmp_path)
    monkeypatch.setattr("patchlight.checkpoint.manifest.FORMAT", 0)
    with pytest.raises(NewerFormatError, match=r"format 0 or an older one, got 1"):
        Manifest.read(path)


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path):
    path = save(tmp_path)
    Manifest(7, {"../other": ()}).write(path)
    (wrong,) = verify(path)
    assert "no plain file name" in wrong


FORGED = {
    "another piece": lambda t: replace(t, chunks=(replace(t.chunks[0], piece=99),)),
    "the header": lambda t: replace(t, chunks=(replace(t.chunks[0], piece=0),)),
    "another file": lambda t: replace(t, chunks=(replace(t.chunks[0], file="none"),)),
    "another type": lambda t: replace(t, dtype="F64"),
    "no type": lambda t: replace(t, dtype="F7"),
    "another shape": lambda t: replace(t, chunks=(replace(t.chunks[0], sizes=(2, 2)),)),
    "a smaller tensor": lambda t: replace(t, shape=(1, 1)),
    "before its start": lambda t: replace(t, chunks=(replace(t.chunks[0], offsets=(-1, 0)),)),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_manifest_with_a_right_checksum_and_wrong_places_is_named(forge, tmp_path):
    path = save(tmp_path)
    manifest = Manifest.read(path)
    name = "student.F32"
    replace(manifest, tensors=manifest.tensors | {name: forge(manifest.tensors[name])}).write(path)
    (wrong,) = verify(path)
    assert "manifest.json that cannot be read" in wrong
    with pytest.raises(DamagedError):
        load_tensors(path, blank(STATE))


@pytest.mark.parametrize(
    "text", ["[]", "5", "{}", "[" * 200_000, '{"clock": 5, "run": {}, "loader": {}, "processes": 1}']
)
def test_facts_that_no_run_has_written_are_named(text, tmp_path):
    path = save(tmp_path)
    (path / "facts.json").write_text(text)
    manifest = Manifest.read(path)
    piece = Piece(0, len(text), checksum(text.encode()))
    replace(manifest, files=manifest.files | {"facts.json": (piece,)}).write(path)
    assert verify(path) == []
    with pytest.raises(DamagedError, match=r"facts\.json that no run has written"):
        read_facts(path)


def test_the_command_lists_checkpoints_and_fails_for_damage(tmp_path, capsys):
    save(tmp_path / "checkpoints", 1)
    path = save(tmp_path / "checkpoints", 2)
    check_checkpoint(tmp_path)
    assert capsys.readouterr().out.count("whole, 3 files, 14 tensors") == 2
    flip(path / "facts.json")
    with pytest.raises(ValueError, match="got 1 of 2 damaged"):
        check_checkpoint(tmp_path)
    assert (
        "step-00000002: A checkpoint must be as it was written, got a facts.json with other bytes"
        in capsys.readouterr().out
    )
    (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match="1 of 1"):
        check_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="holds none"):
        check_checkpoint(tmp_path / "nowhere")


def test_the_command_runs(tmp_path):
    save(tmp_path)
    command = [sys.executable, "-m", "patchlight.checkpoint", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


class Recorder:
    """Names what the disk is asked to do."""

    def __init__(self, monkeypatch):
        self.done: list[str] = []
        sync, replace = os.fsync, Path.replace

        def fsync(descriptor):
            self.done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
            sync(descriptor)

        def move(old, new):
            self.done.append(f"move {Path(new).name}")
            return replace(old, new)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", move)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files need /proc")
def test_a_checkpoint_gets_its_name_when_all_is_on_the_disk_and_old_ones_go_then(tmp_path, monkeypatch):
    parent = tmp_path / "checkpoints"
    save(parent, 1)
    recorder = Recorder(monkeypatch)
    save(parent, 2, keep=1)
    assert recorder.done == [
        "sync rank-0000.safetensors",
        "sync facts.json",
        "sync teacher.safetensors",
        "sync manifest.json",
        "sync step-00000002.partial",
        "move step-00000002",
        "sync checkpoints",
        "move step-00000001.deleted.partial",
        "sync checkpoints",
    ]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.json"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]
