"""Runs the commands of rows, each different one once, and keeps what came of them in a file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..checks import check
from . import small
from .commands import Place, run_of

JOURNAL, LOGS, RESULTS = "journal.jsonl", "logs", "results"
WRITTEN = ("--output.folder", "--save", "--predictions")  # before a folder that a command writes, and wants to be new
PATCHLIGHT = (sys.executable, "-m", "patchlight.command")


@dataclass(frozen=True)
class Outcome:
    """What came of a command."""

    words: list[str]
    ok: bool
    seconds: float
    sentence: str = ""
    """Why it failed: its last line."""
    log: str = ""


@dataclass(frozen=True)
class RowOutcome:
    """What came of all commands of a row."""

    place: Place
    ok: bool
    seconds: float
    """Of its own commands; those that another row shares count for both."""
    sentence: str = ""


class Runner:
    """Commands in a folder: what it has run it does not run again."""

    def __init__(self, out: Path, limit: float, command: Sequence[str] = PATCHLIGHT) -> None:
        """command: what is put before the words of each command."""
        self.out, self.limit, self.command = out, limit, command
        self.done: dict[tuple[str, ...], Outcome] = {}
        out.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        """What the journal says of earlier runs: what was all right is not done again."""
        path = self.out / JOURNAL
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                outcome = Outcome(**json.loads(line))
            except (json.JSONDecodeError, TypeError):
                continue  # half a line of a run that was killed
            if outcome.ok:
                self.done[tuple(outcome.words)] = outcome

    def forget(self) -> None:
        """Starts anew."""
        self.done.clear()
        (self.out / JOURNAL).unlink(missing_ok=True)
        for name in (LOGS, RESULTS, small.DATA, "runs"):
            shutil.rmtree(self.out / name, ignore_errors=True)

    def do(self, words: list[str]) -> Outcome:
        """Runs a command, unless it was run."""
        known = self.done.get(tuple(words))
        if known is not None:
            return known
        for flag, folder in itertools.pairwise(words):
            if flag in WRITTEN:  # what a command left that was killed
                shutil.rmtree(folder, ignore_errors=True)
        outcome = self._run(words)
        self.done[tuple(words)] = outcome
        with (self.out / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(outcome)) + "\n")
        return outcome

    def _run(self, words: list[str]) -> Outcome:
        logs = self.out / LOGS
        logs.mkdir(exist_ok=True)
        log, began = logs / f"{len(list(logs.iterdir())):04}-{words[0]}-{words[1]}.txt", time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            print(" ".join(["patchlight", *words]), file=file, flush=True)
            process = subprocess.Popen(
                [*self.command, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            try:
                code: int | None = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        seconds = time.monotonic() - began
        sentence = f"it takes longer than {self.limit:g} seconds" if code is None else last_line(log) if code else ""
        return Outcome(words, code == 0, round(seconds, 1), sentence, str(log))

    def data(self, words: Sequence[str]) -> str:
        """Draws the data sets that words stand for; why one could not be drawn, or nothing."""
        for name in small.data_names(words):
            command = small.rendering(name, self.out)
            fresh = tuple(command) not in self.done
            if fresh:
                shutil.rmtree(self.out / small.DATA / name, ignore_errors=True)
            outcome = self.do(command)
            if not outcome.ok:
                return outcome.sentence
            if fresh and name == "IMAGENET":
                small.write_lists(self.out)
        return ""

    def row(self, place: Place) -> RowOutcome:
        """Runs all commands of a row; the rest of them after one failed is left out where it depends on it."""
        needed = [
            small.settings()["train"]["images"],
            *(w for m in place.table.measures for e in m.evaluate for w in e.split()),
        ]
        if why := self.data(needed):
            return RowOutcome(place, False, 0.0, why)
        seconds, sentences = 0.0, []
        evaluations = small.small_evaluations(place, self.out)
        training = small.small_training(place.row, self.out)
        fresh = [words for words in evaluations if tuple(words) not in self.done]
        if training and fresh and not (self.out / run_of(place.row)).is_dir():
            self.done.pop(tuple(training), None)  # an earlier run's network, which was removed
        for words in [training, *evaluations] if training else evaluations:
            outcome = self.do(words)
            seconds += outcome.seconds
            if not outcome.ok:
                sentences.append(outcome.sentence)
                if words is training:
                    break
        return RowOutcome(place, not sentences, seconds, "; ".join(dict.fromkeys(sentences)))

    def rows(self, chosen: list[Place]) -> Iterator[RowOutcome]:
        """All rows, those of one network together, so that its run can be removed after them: a run takes a gigabyte."""
        groups: dict[str, list[Place]] = {}
        for place in chosen:
            groups.setdefault(run_of(place.row), []).append(place)
        for run, group in groups.items():
            try:
                for place in group:
                    yield self.row(place)
            finally:
                for folder in (self.out / "runs").glob(f"{Path(run).name}*"):
                    shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen) -> None:
    """Ends a command and all that it started, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line that says something."""
    found = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return re.sub(r"^patchlight [\w -]+: ", "", found[-1]) if len(found) > 1 else "nothing was said"


def check_alone(holder: str, out: Path) -> None:
    """A ValueError if another process works in the folder."""
    check(not holder, f"One process at a time may work in {out}", holder, "wait for it, or choose another --out")
