"""The commands of docs/tutorial.md and evaluation.md run as they stand there, on less data, and print what the pages show.

Comments mark the blocks: `<!-- file NAME -->` is saved, `<!-- tested -->` runs, with `: FLAGS` behind it, or `as: COMMAND` in its
place; `until "WORDS"` presses Ctrl-C when these words are printed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from parity import ROOT

BLOCK = re.compile(r"^(?:<!-- (?P<mark>.+?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r'tested(?: until "(?P<until>.+?)")?(?: as: (?P<instead>.+)|: (?P<flags>.+))?')
NUMBER = r"[\d.,e+-]+"


@dataclass
class Step:
    """A command of the page, and what the page says that it prints."""

    words: list[str]
    until: str | None
    shown: list[str] = field(default_factory=list)


def steps_and_files(page: str) -> tuple[list[Step], dict[str, str]]:
    """The marked blocks of a page: commands in their order, and files by name."""
    steps: list[Step] = []
    files: dict[str, str] = {}
    for block in BLOCK.finditer((ROOT / f"docs/{page}.md").read_text()):
        mark, kind, text = block["mark"] or "", block["kind"], block["text"]
        if mark.startswith("file "):
            files[mark.removeprefix("file ")] = text
        elif mark:
            asked = MARK.fullmatch(mark)
            assert asked, f"nobody understands <!-- {mark} -->"
            command = asked["instead"] or f"{text.strip()} {asked['flags'] or ''}"
            assert "\n" not in text.strip(), "one command per block"
            steps.append(Step(shlex.split(command), asked["until"]))
        elif kind == "" and steps:
            steps[-1].shown += text.splitlines()
        elif kind:
            steps.append(Step([], None))  # not run, and what follows is not compared
    return [step for step in steps if step.words], files


def run(step: Step, folder: Path) -> str:
    """What a command prints. The page is about a CPU."""
    programs = {"patchlight": [sys.executable, "-m", "patchlight.command"], "python": [sys.executable]}
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "ssl"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    process = subprocess.Popen(
        [*programs[step.words[0]], *step.words[1:]],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    with process:
        printed = ""
        for line in process.stdout:
            if step.until and step.until in line and step.until not in printed:
                process.send_signal(signal.SIGINT)
            printed += line
    assert process.returncode == 0, printed
    return printed


def pattern_of(line: str) -> str:
    """A line of the page as a pattern: other numbers, other widths, `...` for anything."""
    parts = [re.split(r"([\d.]*\d[\d.,e+-]*)", part) for part in line.strip().split("...")]
    texts = ["".join(NUMBER if i % 2 else re.escape(" ".join(t.split(" "))) for i, t in enumerate(p)) for p in parts]
    return re.sub(r"(\\ )+", " +", ".*".join(texts))


def is_printed(line: str, printed: str) -> bool:
    return re.search(pattern_of(line), printed) is not None


DEMO = "patchlight train demo --schedule.epochs 1 --data.procedural-images 64 --output.evaluate-every 0"


@pytest.mark.parametrize(("page", "before"), [("tutorial", []), ("evaluation", [Step(shlex.split(DEMO), None)])])
def test_the_commands_print_what_the_page_shows(page, before, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    steps, files = steps_and_files(page)
    for name, text in files.items():
        (folder / name).write_text(text)
    compared = 0
    for step in [*before, *steps]:
        printed = run(step, folder)
        for line in step.shown:
            if re.search(r"\w", line) and "[120/120]" not in line:  # the resumed run is stopped again before its end
                assert is_printed(line, printed), f"{shlex.join(step.words)} did not print {line!r} but:\n{printed}"
                compared += 1
    assert len(steps) >= 6, "the marks are there"
    assert compared >= 15


@pytest.mark.parametrize(
    ("line", "printed", "same"),
    [
        ("step 64: accuracy 20.1%, ... 26.6%", "step 3: accuracy 7.0%, untrained 30.5%", True),
        ("│ steps  │ 120 │ 8 epochs ", "│ steps        │ 14  │ 2 epochs │", True),
        ("The first step took 3.3 s.", "The first steps took 3.3 s.", False),
        ("page: .../index.html", "page: /a folder/other.html", False),
    ],
)
def test_lines_are_compared_by_their_words(line, printed, same):
    assert is_printed(line, printed) is same
