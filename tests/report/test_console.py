"""The terminal shows names as they are, and a run outlives it."""

import io

import pytest
from engine.tiny_run import tiny_run
from rich.console import Console

from patchlight.engine.settings_table import settings_table
from patchlight.evaluation.results import Result, print_result
from patchlight.records import Clock
from patchlight.report import console as console_module
from patchlight.report.console import Display, print_sentence, table_of_names, warn

NAMES = ["[/x]", "[bold]", "a[/b]", ":smile:", "[link=x]y"]
LINE = {"step": 1, "total": 2, "epoch": 0.5, "images": 8, "steps": 1, "seconds": 1.0, "memory/gib": 1.0, "loss": 2.0}


def terminal() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(tmp_path, name):
    console = terminal()
    print_sentence(f"a sentence with {name}", console)
    warn(f"a warning with {name}", console)
    display = Display(console)
    display.update(LINE | {f"{name}/term": 3.0})
    display.warn(f"step 1: {name}")
    console.print(table_of_names(f"title {name}", ("", f"column {name}"), [(name, 1)]))
    run = tiny_run(tmp_path)
    console.print(settings_table(run, Clock(0, 1, 0, 1), 1, 8, {"step": (name, f"why: {name}")}))
    print_result(Result("knn", name, "checkpoint", {}, {}, {"k10": 0.5}), console)
    printed = console.file.getvalue()
    for words in (f"with {name}\n", f"{name}/term: 3.0000", f"step 1: {name}\n", f"title {name}", f"column {name}",
                  f"why: {name}", f"knn on {name}"):  # fmt: skip
        assert words in printed, (words, printed)


class Gone(io.StringIO):
    """A terminal that was closed, or an output on a full disk."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_is_gone_ends_nothing_and_is_said_once(terminal, capsys, monkeypatch):
    monkeypatch.setattr(console_module, "_failures", set())
    file = Gone()
    display = Display(Console(file=file, width=300, force_terminal=terminal))
    for step in (1, 2):
        display.update(LINE | {"step": step})
    display.warn("a warning")
    print_sentence("a sentence", Console(file=file))
    file.full = False
    display.update(LINE | {"loss": 4.5})
    display.close()
    assert capsys.readouterr().err.count("Lines cannot be printed, got [Errno 5] Input/output error") == 1
    assert file.getvalue().count("loss") == 1, "what could not be printed is not repeated"
    assert "4.5" in file.getvalue()
