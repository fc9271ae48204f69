"""A run goes on whatever becomes of its log files, and lines come back when they can be written."""

import io
import json
import shutil
import threading

import pytest
from rich.console import Console

from patchlight.records import Clock
from patchlight.report import page_writer as page_writer_module
from patchlight.report.console import Display
from patchlight.report.journal import Journal
from patchlight.report.log_file import read_lines

PER_EPOCH = 2
PLACES = ("metrics.jsonl", "diagnoses.jsonl", "log.txt", "environment.json", "tensorboard", "report.html")


def clock(step: int) -> Clock:
    return Clock(step, 20, step * 8, PER_EPOCH)


def journal(folder, start: int = 0, track: tuple[str, ...] = ()) -> tuple[Journal, io.StringIO]:
    printed = io.StringIO()
    made = Journal(folder, Display(Console(file=printed, width=300)), track)
    made.open(clock(start + 1), start)
    return made, printed


def write(to: Journal, *steps: int) -> None:
    for step in steps:
        record = {"step": step, "total": 20, "epoch": step / PER_EPOCH, "images": 8 * step, "steps": 1, "loss": 1 / step,
                  "seconds": step / 2, "memory/gib": 1.0}  # fmt: skip
        to.write(clock(step), record)
        to.warn(clock(step), "a name", "A sentence.", fatal=False)


def steps(folder, name: str = "metrics.jsonl", key: str = "step") -> list[int]:
    return [line[key] for line in read_lines(folder / name, key)]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_said_once_and_filled_later(tmp_path, place):
    if place == "tensorboard":
        pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    obstacle = folder / place
    if place == "tensorboard":
        folder.mkdir()
        obstacle.write_text("a file, where a folder should be")
    else:
        obstacle.mkdir(parents=True)
    logs, printed = journal(folder, track=("tensorboard",) if place == "tensorboard" else ())
    write(logs, 1, 2, 3, 4)
    if logs.page.thread:
        logs.page.thread.join()
    assert printed.getvalue().count(f"A run must be able to write {place}, got ") == 1
    assert printed.getvalue().count("A run must be able to write") == 1, "the others are written"
    obstacle.rmdir() if obstacle.is_dir() else obstacle.unlink()
    write(logs, 5, 6)
    logs.close()
    assert f"{place} could be written again" in printed.getvalue()
    assert " lost" not in printed.getvalue()
    assert steps(folder) == steps(folder, "diagnoses.jsonl") == [1, 2, 3, 4, 5, 6]
    assert steps(folder, "log.txt", "epoch") == [0, 1, 2]
    assert json.loads((folder / "environment.json").read_text())["packages"]
    assert "step 6 of 20" in (folder / "report.html").read_text()


def test_a_folder_that_is_removed_is_made_again(tmp_path):
    folder = tmp_path / "run"
    logs, printed = journal(folder)
    write(logs, 1, 2)
    logs.page.thread.join()
    shutil.rmtree(folder)
    write(logs, 3, 4)
    logs.close()
    assert steps(folder) == [3, 4]
    assert "metrics.jsonl was removed while the run writes it" in printed.getvalue()
    assert (folder / "report.html").exists()


def test_a_folder_without_a_place_at_all(tmp_path):
    folder = tmp_path / "run"
    folder.write_text("a file")
    logs, printed = journal(folder)
    write(logs, 1, 2, 3)
    logs.close()
    for name, lost in (
        ("metrics.jsonl", "3 entries are"),
        ("log.txt", "one entry is"),
        ("report.html", "one entry is"),
    ):
        assert f"{name} could not be written until the end: {lost} lost." in printed.getvalue()


def test_the_page_is_written_beside_the_training_and_once_at_a_time(tmp_path, monkeypatch):
    """A page that takes for ever does not delay a line; its failure is a warning."""
    begun, go_on, at_work, most = threading.Event(), threading.Event(), [0], [0]
    build = page_writer_module.build_report

    def slow(summary):
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        begun.set()
        assert go_on.wait(60)
        at_work[0] -= 1
        if most[0] == 1 and not (tmp_path / "report.html").exists() and len(steps(tmp_path)) < 5:
            raise RuntimeError("a page of another planet")
        return build(summary)

    monkeypatch.setattr(page_writer_module, "build_report", slow)
    monkeypatch.setattr(page_writer_module, "PAGE_SECONDS", 0.0)
    logs, printed = journal(tmp_path)
    write(logs, 1)
    assert begun.wait(60)
    write(logs, 2, 3, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert not (tmp_path / "report.html").exists()
    go_on.set()
    logs.page.thread.join()
    assert "report.html, got RuntimeError: a page of another planet; training goes on" in printed.getvalue()
    write(logs, 5)
    logs.close()
    assert most == [1]
    assert not logs.page.thread.is_alive()
    assert "step 5 of 20" in (tmp_path / "report.html").read_text()


def test_damage_is_said_at_the_start(tmp_path):
    write(journal(tmp_path)[0], 1, 2, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(bytes(5))
    logs, printed = journal(tmp_path, start=2)
    write(logs, 3)
    logs.close()
    assert (
        f"{tmp_path / 'metrics.jsonl'}: line 4 (5 bytes) was damaged, and kept in metrics.jsonl.damaged"
        in printed.getvalue()
    )
    assert steps(tmp_path) == [1, 2, 3]
    assert "metrics.jsonl.damaged has damaged lines" in (tmp_path / "report.html").read_text()
