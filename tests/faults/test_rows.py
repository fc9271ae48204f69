"""A few faults of each row, and checks of what injects them; `make faults` tries hundreds."""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import run
from faults.child import Kill
from faults.file_operations import Count, Operation, Record, watch
from faults.power import Disk, differences, read_record, write_tree
from faults.tally import Tally
from faults.tiny import Outcome
from parity import SEED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
FEW = {"kills": 4, "damage": 12, "pickles": 6, "full_disk": 6, "power_cuts": 6, "workers": 4}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("row", FEW)
def test_nothing_is_lost(row, workspace):
    tries = importlib.import_module(f"faults.{row}").tries
    outcomes = list(tries(np.random.default_rng(SEED), workspace, FEW[row]))
    assert len(outcomes) >= FEW[row]
    assert [f"{outcome.what}: {outcome.lost}" for outcome in outcomes if outcome.lost] == []


def test_every_row_is_tried_here():
    assert FEW.keys() == run.ROWS.keys()


def test_a_loss_is_counted_and_named(capsys):
    tally = Tally()
    tally.begin("kills", 3)
    for outcome in (Outcome("a", lost="a step"), Outcome("b"), Outcome("c", skipped="no disk")):
        tally.add(outcome)
    tally.print_table()
    assert tally.lost == 1
    printed = capsys.readouterr().out
    assert "kills 1/3  a    LOST: a step" in printed
    assert [cell.strip() for cell in printed.splitlines()[-2].split("│")[1:-2]] == ["kills", "2", "1", "1", "1"]


def write_many_ways(folder: Path, listed: Path) -> None:
    """Every call that changes files, in a process of its own, whose functions it replaces."""
    folder.mkdir()
    watch(folder, Record(listed))
    (folder / "text.txt").write_text("text")
    (folder / "bytes").write_bytes(bytes(range(256)) * 100)
    with (folder / "text.txt").open("a") as file:
        file.write(" and more")
    with (folder / "bytes").open("r+b") as file:
        file.seek(100)
        file.write(b"in between")
        file.truncate(20_000)
    (folder / "inside" / "deep").mkdir(parents=True)
    descriptor = os.open(folder / "inside/file", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"0123456789")
    os.ftruncate(descriptor, 7)
    os.pwrite(descriptor, b"ab", 2)
    os.fsync(descriptor)
    os.close(descriptor)
    os.truncate(folder / "inside/file", 5)
    (folder / "inside/file").rename(folder / "inside/renamed")
    os.link(folder / "inside/renamed", folder / "linked")
    (folder / "inside/deep/gone").write_text("gone")
    (folder / "inside/deep/gone").unlink()
    (folder / "inside/deep").rmdir()
    (folder / "text.txt").write_text("new")
    (folder.parent / "outside").write_text("unseen")


def in_a_process(work, *arguments) -> int:
    process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_every_way_to_write_is_seen(tmp_path):
    assert in_a_process(write_many_ways, tmp_path / "run", tmp_path / "record") == 0
    disk = Disk()
    for operation in read_record(tmp_path / "record"):
        disk.apply(operation)
    assert differences(disk.without_cut(), tmp_path / "run") == []
    assert disk.without_cut()["linked"] == b"01ab4"
    (tmp_path / "run/unseen").write_text("by something else")
    (tmp_path / "run/linked").write_text("changed")
    unseen = [Path(path).name for path in differences(disk.without_cut(), tmp_path / "run")]
    assert sorted(unseen) == ["linked", "renamed", "unseen"]  # a link has two names


def die_at_the_third(folder: Path) -> None:
    folder.mkdir()
    watch(folder, Count(3, lambda _: Kill(0, 3, "rank", 9).now()))
    for number in range(5):
        (folder / f"{number}").touch()


def test_a_kill_comes_before_the_operation_that_it_aims_at(tmp_path):
    assert in_a_process(die_at_the_third, tmp_path / "run") == -9
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["0", "1"]


def cuts_after(operations: list[Operation]) -> list[dict]:
    """Many of the trees that a power cut may leave."""
    disk, rng = Disk(), np.random.default_rng(SEED)
    for operation in operations:
        disk.apply(operation)
    return [disk.after_cut(rng) for _ in range(300)]


def test_without_fsync_anything_may_be_lost():
    found = cuts_after([Operation("create", "a", inode=1), Operation("write", "a", "", 1, 0, b"data")])
    assert {} in found
    contents = {tree["a"] for tree in found if tree}
    assert {b"", b"data", bytes(4)} <= contents
    assert all(b"data".startswith(content) or content == bytes(4) for content in contents)


def test_what_is_fsynced_is_kept():
    written = [Operation("create", "new", inode=1), Operation("write", "new", "", 1, 0, b"data")]
    synced = [*written, Operation("fsync", "new", inode=1)]
    assert {tree.get("new", b"data") for tree in cuts_after(synced)} == {b"data"}
    assert {} in cuts_after(synced)  # the name is not
    renamed = [*synced, Operation("rename", "new", "final"), Operation("fsync", ".")]
    assert all(tree == {"final": b"data"} for tree in cuts_after(renamed))
    replaced = [*renamed, Operation("create", "new", inode=2), Operation("write", "new", "", 2, 0, b"later")]
    replaced += [Operation("fsync", "new", inode=2), Operation("rename", "new", "final")]
    assert {tree["final"] for tree in cuts_after(replaced)} == {b"data", b"later"}


def test_folders_are_lost_with_what_they_hold(tmp_path):
    made = [Operation("mkdir", "a"), Operation("create", "a/file", inode=1), Operation("fsync", "a")]
    found = cuts_after(made)
    assert {} in found
    assert {"a": {"file": b""}} in found
    assert all(tree in ({}, {"a": {"file": b""}}) for tree in found)
    write_tree({"a": {"file": b"x"}}, tmp_path / "tree")
    assert (tmp_path / "tree/a/file").read_bytes() == b"x"
