"""Runs parts one after another, each under its limit; what is known is written after each, whatever happens next."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..rows import ROOT
from .plan import Part
from .results import DONE, DROPPED, LEFT_OUT, STOPPED, TRIED, Outcome, markdown, result_of

RESERVE = 8.0  # seconds kept for the archive
GRACE = 5.0  # seconds that a part has to end after it is interrupted


@dataclass
class Runner:
    """The parts' outcomes so far are those in the folder, so that a second call goes on where the first ended."""

    folder: Path
    archive: Path
    seconds: float  # in all
    grace: float = GRACE
    reserve: float = RESERVE
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: print(text, flush=True)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.archive.parent.mkdir(parents=True, exist_ok=True)
        if self.state.exists():
            self.outcomes = {name: Outcome(**found) for name, found in json.loads(self.state.read_text()).items()}

    @property
    def state(self) -> Path:
        return self.folder / "parts.json"

    @property
    def left(self) -> float:
        return self.seconds - self.reserve - (time.monotonic() - self.began)

    def run(self, parts: Sequence[Part], plan: Sequence[Part] = ()) -> None:
        """All parts that are not done: those that were never tried first. A signal ends it after the archive is written.

        The summary also lists parts of the plan that an earlier call ran.
        """
        listed = [part for part in plan or parts if part in parts or part.name in self.outcomes]
        tried = lambda part: part.name in self.outcomes and self.outcomes[part.name].state in TRIED
        with signals_raise():
            try:
                for part in sorted(parts, key=tried):
                    self.run_part(part)
                    self.write(listed)
            finally:
                self.write(listed)

    def run_part(self, part: Part) -> None:
        """Runs one part, or says why not."""
        known = self.outcomes.get(part.name)
        if known and known.state == DONE:
            return self.say(f"{part.name}: done before")
        if missing := [name for name in part.needs if not is_there(name)]:
            self.outcomes[part.name] = Outcome(LEFT_OUT, 0, f"{', '.join(missing)} is not here")
            return self.say(f"{part.name}: left out, {', '.join(missing)} is not here")
        if self.left < part.seconds / 2:
            why = f"limit {part.seconds} s, {max(0, self.left):.0f} s left"
            if known is None or known.state not in TRIED:
                self.outcomes[part.name] = Outcome(DROPPED, 0, why)
            return self.say(f"{part.name}: dropped, {why}")
        limit = min(part.seconds, self.left)
        self.say(f"{part.name}: at most {limit:.0f} s; {self.left:.0f} s left of {self.seconds:.0f}")
        outcome = self.outcomes[part.name] = Outcome(STOPPED, 0, "it was running when all was stopped")
        began = time.monotonic()
        try:
            status = self.execute(part, limit)
        finally:
            outcome.seconds = round(time.monotonic() - began, 1)
        outcome.state, outcome.result = result_of(part, self.folder, status, limit)
        self.say(f"    {outcome.state} in {outcome.seconds:.0f} s: {outcome.result}")

    def execute(self, part: Part, limit: float) -> int | None:
        """The exit status, or None if the part did not end within its limit. Its whole process group ends with it."""
        with (self.folder / f"{part.name}.txt").open("wb") as output:
            words = part.words(python=sys.executable, folder=str(self.folder), cores=str(cores()))
            environment = self.environment() | dict(part.environment)
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                process_group=0,
            )  # fmt: skip
            grace = min(1.0, self.grace)  # where all is stopped, little time is left
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                grace = self.grace
                return None
            finally:
                end_group(process, grace)

    def environment(self) -> dict[str, str]:
        """Compiled kernels are kept beside the folder, so that a second call and the next part find them."""
        found = dict(os.environ)
        own = [str(ROOT / "ssl"), str(ROOT / "kernels"), str(ROOT)]
        found["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [found.get("PYTHONPATH")])])
        found.setdefault("TRITON_CACHE_DIR", str(self.folder.parent / "triton_cache"))
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.folder.parent / "inductor_cache"))
        return found | {"PYTHONUNBUFFERED": "1"}

    def write(self, parts: Sequence[Part]) -> None:
        """The outcomes, the summary and the archive, each replaced at once."""
        replace_text(self.state, json.dumps({name: asdict(found) for name, found in self.outcomes.items()}, indent=1))
        rows = [(part, self.outcomes.get(part.name)) for part in parts]
        replace_text(self.folder / "summary.md", markdown(rows, self.folder))
        unfinished = self.archive.with_name(self.archive.name + ".part")
        with tarfile.open(unfinished, "w:gz") as file:
            file.add(self.folder, self.folder.name, filter=without_links)
        unfinished.replace(self.archive)


def end_group(process: subprocess.Popen, grace: float) -> None:
    """Interrupts a part that still runs, so that it prints what it has, and kills what is left of its group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT raise SystemExit, once."""
    numbers = signal.SIGTERM, signal.SIGINT

    def stop(number: int, _) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # the archive is being written
        raise SystemExit(128 + number)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def is_there(name: str) -> bool:
    """Whether a program, or a module if the name has a dot, is on this machine."""
    if "." not in name:
        return shutil.which(name) is not None
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def cores() -> int:
    return len(os.sched_getaffinity(0))


def replace_text(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    unfinished.replace(path)


def without_links(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return member if member.isfile() or member.isdir() else None
