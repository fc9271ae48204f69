"""`python -m patchlight.data.check_data PATH`: reads every image once, in parallel, and says which cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .reading import REPORT_FILE, why_unreadable
from .shards import INDEX_SUFFIX, TarShards
from .sources import open_source
from .stored import Source, Stored

_PER_TASK = 64  # images that a thread is handed at a time


@dataclass(frozen=True, slots=True)
class Bad:
    """An image that cannot be read, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What a scan found, and where it is written."""

    images: int
    bad: tuple[Bad, ...]
    clean: Path  # the readable images, in a form that Data.path takes
    report: Path  # a line per bad image: its name, a tab, why

    @property
    def share(self) -> float:
        return len(self.bad) / self.images


def check(source: Stored, out: Path, workers: int) -> Checked:
    """Reads every image of a source; writes the clean list and the report into the folder `out`."""
    columns = TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]} bad")
    bad: list[Bad] = []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(source), bad=0)
        for images, found in find_bad(source, workers):
            bad += found
            progress.update(task, advance=images, bad=len(bad))
    out.mkdir(parents=True, exist_ok=True)
    clean = out / f"clean{INDEX_SUFFIX if isinstance(source, TarShards) else '.txt'}"
    report, skipped = out / REPORT_FILE, {b.index for b in bad}
    _write(clean, [source.line(index) for index in range(len(source)) if index not in skipped])
    _write(report, [f"{source.name(b.index)}\t{b.reason}" for b in bad])
    return Checked(len(source), tuple(bad), clean, report)


def find_bad(source: Source, workers: int) -> Iterator[tuple[int, list[Bad]]]:
    """Goes through a source in order; after every few images, how many they were and which of them are bad."""

    def look(indices: range) -> tuple[int, list[Bad]]:
        return len(indices), [bad for bad in (_try(source, index) for index in indices) if bad]

    parts = [range(first, min(first + _PER_TASK, len(source))) for first in range(0, len(source), _PER_TASK)]
    with ThreadPoolExecutor(workers) as pool:  # decoders let other threads run
        yield from pool.map(look, parts)


def _try(source: Source, index: int) -> Bad | None:
    try:
        source.read(index)
    except Exception as error:  # decoders raise whatever they like on a damaged file
        return Bad(index, why_unreadable(error))
    return None


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def check_data(
    path: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("data_check"),
    workers: int = os.cpu_count() or 1,
    most_bad: float = 0.01,
) -> None:
    """Reads every image once; writes a list of the good ones and a report that names each bad one and why.

    Ends with an error if more than a share of them is bad.

    Args:
        path: folder of images, folder of tar shards, shard, or list of files.
        out: folder for clean.txt (clean.index for shards), which Data.path takes, and bad_files.tsv.
        workers: threads.
        most_bad: share of bad images that is accepted.
    """
    checked = check(open_source(path), out, workers)
    print(f"{len(checked.bad)} of {checked.images} images are bad; report: {checked.report}; clean: {checked.clean}")
    if checked.share > most_bad:
        raise SystemExit(
            f"check_data: at most {most_bad:.2%} of the images may be bad, got {checked.share:.2%}; read"
            f" {checked.report}, then repair the data or train on {checked.clean}"
        )


if __name__ == "__main__":
    tyro.cli(check_data)
