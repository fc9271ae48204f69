"""Files of lines after a crash: damage is put aside and said, everything else is used, and nothing is lost on the way."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from patchlight.report import log_file
from patchlight.report.log_file import LogFile, append, read_lines, to_bytes
from patchlight.report.run_folder import DIAGNOSES_FILE, EPOCHS_FILE, KNN_FILE, METRICS_FILE

FILES = {METRICS_FILE: "step", KNN_FILE: "step", DIAGNOSES_FILE: "step", EPOCHS_FILE: "epoch"}
DAMAGE = {
    "zeros": bytes(700),
    "half a line": b'{"step": 4, "epoch": 4, "lo',
    "no text": b"\xff\xfe\x80\x81",
    "no object": b"[1, 2]",
    "no count": b'{"loss": 1.0}',
    "a count that is none": b'{"step": "4", "epoch": -1}',
    "deep": b"[" * 100_000,
}
damage = pytest.mark.parametrize("bad", DAMAGE.values(), ids=DAMAGE)


def written(path: Path, count: int = 3) -> bytes:
    for number in range(1, count + 1):
        append(path, to_bytes({"step": number, "epoch": number, "loss": 1 / number}))
    return path.read_bytes()


def rewound(path: Path, last: float = 10**9, key: str = "step") -> tuple[list[dict], list[str]]:
    """The lines that stay, and what is said."""
    kept, said = [], []
    LogFile(path, said.append, key).rewind(lambda line: line[key] <= last, kept.append)
    assert kept == read_lines(path, key)
    return kept, said


@damage
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_tail_is_put_aside_and_said(tmp_path, name, bad):
    path = tmp_path / name
    good = written(path)
    path.write_bytes(good + bad)
    assert len(read_lines(path, FILES[name])) == 3
    kept, said = rewound(path, key=FILES[name])
    assert len(kept) == 3
    assert path.read_bytes() == good
    assert (tmp_path / f"{name}.damaged").read_bytes() == bad + b"\n"
    assert said == [
        f"{path}: line 4 ({len(bad)} bytes) was damaged, and kept in {name}.damaged; the other lines are used."
    ]
    assert rewound(path, key=FILES[name])[1] == [], "once"


@damage
def test_damage_in_the_middle_is_put_aside_too(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    lines = written(path, 6).splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], bad + b"\n", *lines[1:3], bad + b"\n", bad + b"\n", bad + b"\n", *lines[3:]]))
    kept, (sentence,) = rewound(path, 5)
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 5]
    assert path.read_bytes() == b"".join(lines[:5])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == 4 * (bad + b"\n")
    total = 4 * (len(bad) + 1)
    assert f"line 2 ({len(bad) + 1} bytes), line 5 " in sentence
    assert f"and 1 more, {total} bytes in all, were damaged" in sentence


def test_a_line_behind_zeros_or_without_its_end_is_used(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, second, third = written(path).splitlines(keepends=True)
    path.write_bytes(first + bytes(9) + second + third.rstrip())
    kept, said = rewound(path)
    assert [line["step"] for line in kept] == [1, 2, 3]
    assert path.read_bytes() == first + second + third
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == bytes(9) + second
    assert len(said) == 1


def test_a_file_without_damage_is_only_cut(tmp_path):
    """Which works on a full disk, and leaves the file's own bytes."""
    path = tmp_path / "metrics.jsonl"
    good = written(path, 5)
    before = path.stat()
    assert rewound(path, 3) == ([json.loads(line) for line in good.splitlines()[:3]], [])
    assert path.read_bytes() == b"".join(good.splitlines(keepends=True)[:3])
    assert path.stat().st_ino == before.st_ino
    modified = path.stat().st_mtime_ns
    rewound(path, 3)
    assert path.stat().st_mtime_ns == modified, "nothing to do"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert rewound(tmp_path / "none.jsonl") == ([], [])


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_in_the_middle_loses_nothing(tmp_path, monkeypatch, call):
    path = tmp_path / "metrics.jsonl"
    lines = written(path, 5).splitlines(keepends=True)
    whole = b"".join([lines[0], b"\xff\xff\n", *lines[1:]])
    path.write_bytes(whole)
    calls, fsync = [], log_file.os.fsync

    def kill(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise Killed
        fsync(descriptor)

    monkeypatch.setattr(log_file.os, "fsync", kill)
    with pytest.raises(Killed):
        rewound(path, 4)
    monkeypatch.undo()
    assert path.read_bytes() == whole
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\xff\xff\n"
    assert len(rewound(path, 4)[0]) == 4
    assert path.read_bytes() == b"".join(lines[:4])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\xff\xff\n", "not twice"


@contextmanager
def no_room_above(size: int):
    """The operating system refuses larger files, as a full disk does: with a part of the bytes written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_for_room_and_none_is_lost_or_doubled(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    log = LogFile(path, said.append)
    log.add({"step": 0})
    with no_room_above(40):
        for step in range(1, 30):
            log.add({"step": step})
            assert path.read_bytes().endswith(b"}\n"), "never half a line"
    assert len(said) == 1
    assert "A run must be able to write metrics.jsonl, got OSError" in said[0]
    assert len(read_lines(path)) == 3
    log.add({"step": 30})
    assert [line["step"] for line in read_lines(path)] == list(range(31))
    assert len(said) == 2
    assert "metrics.jsonl could be written again" in said[1]


def test_a_rewind_waits_too(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    lines = written(path, 5).splitlines(keepends=True)
    path.write_bytes(lines[0] + b"??\n" + b"".join(lines[1:]))
    log = LogFile(path, said.append)
    with no_room_above(20):
        log.rewind(lambda line: line["step"] <= 3)
        log.add({"step": 4, "loss": 7.0})
    assert len(said) == 1
    log.outlet.flush()
    assert [line.get("loss") for line in read_lines(path)] == [1.0, 1 / 2, 1 / 3, 7.0]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"??\n"


def test_a_file_that_was_removed_begins_anew_aloud(tmp_path):
    said = []
    log = LogFile(tmp_path / "run" / "metrics.jsonl", said.append)
    log.add({"step": 1})
    log.path.unlink()
    log.path.parent.rmdir()
    log.add({"step": 2})
    assert read_lines(log.path) == [{"step": 2}]
    assert said == [f"{log.path} was removed while the run writes it: it begins anew."]


def test_readers_skip_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path)
    with path.open("a") as file:
        file.write('{"step": 4')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
