"""Random damage to the log files of a run: reading, repairing and the page never fail, and no undamaged line is lost."""

import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fuzz.rounds import fuzz
from report.test_page import Page
from rich.console import Console

from patchlight.records import Clock
from patchlight.report import journal as journal_module
from patchlight.report.console import Display
from patchlight.report.journal import Journal
from patchlight.report.log_file import LogFile, read_lines
from patchlight.report.page import build_report
from patchlight.report.run_folder import DIAGNOSES_FILE, EPOCHS_FILE, KNN_FILE, METRICS_FILE
from patchlight.report.run_summary import RunSummary

FILES = {METRICS_FILE: "step", KNN_FILE: "step", DIAGNOSES_FILE: "step", EPOCHS_FILE: "epoch"}
STEPS, PER_EPOCH = 24, 4


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    """The files of a finished run."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "write_environment", lambda folder: None)
        folder = Path(name)
        logs, knn = journal(folder, 0), LogFile(folder / KNN_FILE, print)
        for step in range(1, STEPS + 1):
            write(logs, step)
            if step % PER_EPOCH == 0:
                knn.add({"step": step, "k10": step / 100, "k20": 0.5})
        logs.close()
        return {name: (folder / name).read_bytes() for name in FILES}


def journal(folder: Path, start: int) -> Journal:
    made = Journal(folder, Display(Console(file=io.StringIO(), width=200)), track=())
    made.open(Clock(start, STEPS, 8 * start, PER_EPOCH), start)
    return made


def write(logs: Journal, step: int) -> None:
    clock = Clock(step, STEPS, 8 * step, PER_EPOCH)
    record = {"step": step, "total": STEPS, "epoch": step / PER_EPOCH, "images": 8 * step, "steps": 1, "loss": 4 / step,
              "dino/cls": float("nan") if step % 7 == 0 else 2.5, "dino/cls/ln_k": 0.5, "lr": 1e-4 * step,
              "data/wait_seconds": 0.25, "data/wait_share": 0.125, "data/replaced": 1.0, "memory/gib": 1.5,
              "speed/images_per_second": 100.0, "seconds": 0.5 * step}  # fmt: skip
    logs.write(clock, record)
    logs.warn(clock, "uniform collapse", "Lower the temperature.", fatal=False)


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """What a crash, a bad disk or an editor makes of a file."""
    at, size = int(random.integers(len(data) + 1)), int(random.integers(1, 200))
    lines = data.splitlines(keepends=True)
    order = list(range(len(lines)))
    kind = random.integers(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(size) + data[at + size * int(random.integers(2)) :]
    if kind == 2:
        return data[:at] + random.bytes(size) + data[at:]
    if kind == 3:
        flipped = bytearray(data)
        for _ in range(int(random.integers(1, 9)) if data else 0):
            flipped[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        return bytes(flipped)
    if kind == 4:
        random.shuffle(order)
    elif kind == 5 and lines:
        order += [int(random.integers(len(lines))) for _ in range(3)]
    else:
        order = [number for number in order if random.random() < 0.8]
    return b"".join(lines[number] for number in order)


def damage(folder: Path, good: dict[str, bytes], random: np.random.Generator) -> dict[str, bytes]:
    """Writes damaged files; returns their contents, without those that are missing or no files."""
    contents = {}
    for name, data in good.items():
        place = random.integers(10)
        if place == 0:
            (folder / name).mkdir()
        elif place > 1:
            for _ in range(int(random.integers(4))):
                data = damaged(data, random)
            (folder / name).write_bytes(data)
            contents[name] = data
    return contents


def whole_lines(data: bytes, good: bytes) -> list[bytes]:
    """The lines that no damage has touched, without the newline."""
    known = set(good.split(b"\n")) - {b""}
    return [line for line in data.split(b"\n") if line in known]


def check_page(folder: Path) -> None:
    Page(build_report(RunSummary(folder).update()))


def test_readers_use_every_undamaged_line(good):
    def attempt(random: np.random.Generator) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in damage(folder, good, random).items():
                found = Counter(json.dumps(line) for line in read_lines(folder / file, FILES[file]))
                ended = data[: data.rfind(b"\n") + 1]
                expected = Counter(json.dumps(json.loads(line)) for line in whole_lines(ended, good[file]))
                assert not expected - found
            check_page(folder)

    fuzz(attempt)


def test_repair_keeps_every_undamaged_line_and_every_byte(good):
    def attempt(random: np.random.Generator) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder, said = Path(name), []
            for file, data in damage(folder, good, random).items():
                path, kept = folder / file, []
                LogFile(path, said.append, FILES[file]).rewind(lambda line: True, kept.append)
                repaired = path.read_bytes()
                assert (
                    kept == read_lines(path, FILES[file]) == [json.loads(line) for line in repaired.split(b"\n")[:-1]]
                )
                assert not Counter(whole_lines(data, good[file])) - Counter(repaired.split(b"\n"))
                aside = folder / f"{file}.damaged"
                bad = aside.read_bytes() if aside.exists() else b""
                assert bool(bad) == any(sentence.startswith(f"{path}: ") for sentence in said)
                assert not Counter(data.split(b"\n")) - Counter((repaired + b"\n" + bad).split(b"\n")) - Counter([b""])
                count = len(said)
                LogFile(path, said.append, FILES[file]).rewind(lambda line: True)
                assert path.read_bytes() == repaired
                assert len(said) == count, "a repaired file is not repaired again"

    fuzz(attempt)


def test_a_run_resumes_from_any_damage(good, monkeypatch):
    monkeypatch.setattr(journal_module, "write_environment", lambda folder: None)

    def attempt(random: np.random.Generator) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder, start = Path(name), int(random.integers(STEPS))
            contents = damage(folder, good, random)
            logs = journal(folder, start)
            for step in range(start + 1, STEPS + 1):
                write(logs, step)
            logs.close()
            check_page(folder)
            for file in (METRICS_FILE, DIAGNOSES_FILE):
                if (folder / file).is_dir():
                    continue
                found = Counter(line["step"] for line in read_lines(folder / file))
                known = [json.loads(line)["step"] for line in whole_lines(contents.get(file, b""), good[file])]
                assert not Counter(step for step in known if step <= start) - found
                assert all(found[step] == 1 for step in range(start + 1, STEPS + 1)), "neither lost nor doubled"
            if not (folder / EPOCHS_FILE).is_dir():
                epochs = Counter(line["epoch"] for line in read_lines(folder / EPOCHS_FILE, "epoch"))
                last = range(start // PER_EPOCH + 1, STEPS // PER_EPOCH)
                assert all(epochs[epoch] == 1 for epoch in last), "epochs that this process saw from their start"

    fuzz(attempt)
