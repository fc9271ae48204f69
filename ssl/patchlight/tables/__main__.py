"""`patchlight tables`: the papers' tables, what to type for each row, and small runs of all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..checks import check
from ..evaluation.paper_numbers import PAPERS, PaperTable, all_tables, tables_named
from ..process import FolderLock
from ..report.console import print_sentence, table_of_names
from ..usage import POSITIONAL, call_one_of
from .commands import Place, lines, places
from .runner import RowOutcome, Runner, check_alone
from .small import settings


def chosen_tables(words: Sequence[str]) -> list[PaperTable]:
    """The tables that words name; a paper's name begins another name: `SERE 5 PQCL 3` are two. All without words."""
    names: list[str] = []
    for word in " ".join(words).split():
        if word.lower().rstrip(",") in (paper.lower() for paper in PAPERS.values()) or not names:
            names.append(word)
        else:
            names[-1] += f" {word}"
    found = [table for name in names for table in tables_named(name)] if names else list(all_tables())
    return list(dict.fromkeys(found))


def list_tables(names: Annotated[tuple[str, ...], POSITIONAL] = ()) -> None:
    """Lists tables and figures.

    Args:
        names: of papers or tables, as in `list SERE`; all by default.
    """
    rows = [
        (
            table.title,
            len(table.rows),
            sum(value is not None for row in table.rows for value in row.values),
            table.about,
        )
        for table in chosen_tables(names)
    ]
    Console().print(table_of_names("the papers' tables", ("table", "rows", "numbers", "what"), rows))


def show(names: Annotated[tuple[str, ...], POSITIONAL] = ()) -> None:
    """Prints what to type for each row, as in `show SERE 5`.

    Args:
        names: of papers or tables; all by default.
    """
    for table in chosen_tables(names):
        print(f"{table.title}: {table.about}\n")
        for place in places([table]):
            print("\n".join([f"# row {place.number}: {_numbers(place)}", *lines(place), ""]))


def _numbers(place: Place) -> str:
    """A row's network and its numbers."""
    found = [str(place).partition(": ")[2]]
    for measure in place.table.measures:
        pairs = zip(measure.names, place.table.values_of(place.row, measure), strict=False)
        found += [f"{name} {value}" for name, value in pairs if value is not None]
    return ", ".join(found)


def run(
    names: Annotated[tuple[str, ...], POSITIONAL] = (),
    out: Path = Path("build/tables"),
    resume: bool = False,
    limit: float = settings()["limit"],
) -> None:
    """Tries the commands of every row: the same networks and settings, small drawn images, one step of each.

    Args:
        names: of papers or tables, as in `run "SERE 5" "PQCL Figure 3"`; all by default.
        out: for drawn images, logs and results.
        resume: leave out what was all right before.
        limit: seconds after which a command has failed.
    """
    check(limit > 0, "run.limit must be positive", limit, f"the default is {settings()['limit']}")
    rows, out = places(chosen_tables(names)), out.absolute()
    lock = FolderLock(out, print_sentence)
    check_alone(lock.other, out)
    runner, found = Runner(out, limit), []
    if not resume:
        runner.forget()
    try:
        found = _run_rows(runner, rows)
    finally:
        lock.release()
    failed = [outcome for outcome in found if not outcome.ok]
    got = f"{len(failed)} of {len(rows)} that do not (named above)"
    check(not failed, "Every row should run", got, f"the logs are in {out / 'logs'}")
    print_sentence(f"all {len(rows)} rows run; results: {out / 'results'}")


def _run_rows(runner: Runner, rows: list[Place]) -> list[RowOutcome]:
    """A line per row, and a bar on a terminal."""
    console, found = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=len(rows))
        try:
            for outcome in runner.rows(rows):
                found.append(outcome)
                bar.console.print(_line(outcome), soft_wrap=True)
                bar.advance(task)
        except KeyboardInterrupt:
            kept = f"{len(found)} of {len(rows)} rows were tried; --resume leaves out what was all right"
            print_sentence(f"stopped: {kept}", bar.console, "bold yellow")
            raise SystemExit(130) from None
    return found


def _line(outcome: RowOutcome) -> Text:
    state = ("ok", "green") if outcome.ok else ("failed", "bold red")
    said = f": {outcome.sentence}" if outcome.sentence else ""
    return Text.assemble(state, f" {outcome.seconds:.0f} s  {outcome.place}{said}")


COMMANDS: dict[str, Callable[..., None]] = {"list": list_tables, "show": show, "run": run}


def main(arguments: Sequence[str] | None = None, prog: str = "patchlight tables") -> None:
    call_one_of(COMMANDS, sys.argv[1:] if arguments is None else arguments, prog)


if __name__ == "__main__":
    main()
