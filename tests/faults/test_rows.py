"""A few faults of each row, and checks of what injects them; `make faults` tries hundreds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import run
from faults.file_operations import Operation
from faults.power import Disk, differences, read_record, write_tree
from faults.tally import Tally
from faults.tiny import Outcome
from parity import SEED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
FAULTS = Path(__file__).parent
FEW = {"kills": 3, "damage": 12, "pickles": 6, "full_disk": 4, "power_cuts": 2, "workers": 3}


def test_nothing_is_lost(tmp_path):
    """In a process of its own, whose processes are forked from one that has imported everything."""
    rows = [f"{name}:{tries}" for name, tries in FEW.items()]
    command = [sys.executable, FAULTS / "run.py", *rows, "--seed", str(SEED), "--folder", tmp_path / "faults"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (
        "\n".join(line for line in done.stdout.splitlines() if "survived" not in line) + done.stderr
    )


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


def run_script(*arguments) -> int:
    """A process of its own, as the functions that write are replaced in it."""
    return subprocess.run([sys.executable, FAULTS / "every_write.py", *map(str, arguments)]).returncode


def test_every_way_to_write_is_seen(tmp_path):
    assert run_script(tmp_path / "run", tmp_path / "record") == 0
    disk = Disk()
    for operation in read_record(tmp_path / "record"):
        disk.apply(operation)
    assert differences(disk.without_cut(), tmp_path / "run") == []
    assert disk.without_cut()["linked"] == b"01ab4"
    (tmp_path / "run/unseen").write_text("by something else")
    (tmp_path / "run/linked").write_text("changed")
    unseen = [Path(path).name for path in differences(disk.without_cut(), tmp_path / "run")]
    assert sorted(unseen) == ["linked", "renamed", "unseen"]  # a link has two names


def test_a_kill_comes_before_the_operation_that_it_aims_at(tmp_path):
    assert run_script(tmp_path / "run") == -9
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
