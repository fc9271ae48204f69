"""`python -m patchlight.data.check_data PATH`: reads every image once, in parallel, and lists those that cannot be read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..checks import sentence
from ..usage import POSITIONAL, call
from .lists import write_rows
from .reading import REPORT_FILE, WrongItem, describe_error
from .shards import INDEX_SUFFIX, TarShards
from .sources import open_source
from .stored import MOST_PIXELS, Source, StoredImages

_PER_TASK = 64  # images that a thread gets at a time


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that cannot be read, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The bad images of a source, and where the lists are."""

    images: int
    bad: tuple[BadImage, ...]
    clean: Path | None  # the readable images, in a form that Data.path takes; files only
    report: Path  # a line per bad image: its name, a tab, the reason

    @property
    def bad_share(self) -> float:
        return len(self.bad) / self.images


def check_images(source: Source, out: Path, workers: int) -> CheckResult:
    """Reads every image of a source; writes the report into the folder `out`, and of files the clean list."""
    columns = TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[bad]} bad")
    bad: list[BadImage] = []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(source), bad=0)
        for images, found in find_bad_images(source, workers):
            bad += found
            progress.update(task, advance=images, bad=len(bad))
    out.mkdir(parents=True, exist_ok=True)
    report, clean, bad_indices = out / REPORT_FILE, None, {b.index for b in bad}
    write_rows(report, ((source.name(b.index), b.reason) for b in bad))
    if isinstance(source, StoredImages):
        clean = out / f"clean{INDEX_SUFFIX if isinstance(source, TarShards) else '.txt'}"
        write_rows(clean, (source.row(index) for index in range(len(source)) if index not in bad_indices))
    return CheckResult(len(source), tuple(bad), clean, report)


def find_bad_images(source: Source, workers: int) -> Iterator[tuple[int, list[BadImage]]]:
    """Reads a source in order; yields, every few images, how many they were and which of them are bad."""

    def check_part(indices: range) -> tuple[int, list[BadImage]]:
        return len(indices), [bad for bad in (_read_error(source, index) for index in indices) if bad]

    workers = workers if isinstance(source, StoredImages) else 1  # a data set of the user's own may allow no threads
    parts = [range(first, min(first + _PER_TASK, len(source))) for first in range(0, len(source), _PER_TASK)]
    with ThreadPoolExecutor(workers) as pool:  # decoders release the interpreter lock
        yield from pool.map(check_part, parts)


def _read_error(source: Source, index: int) -> BadImage | None:
    try:
        source.read(index)
    except WrongItem:
        raise
    except Exception as error:  # a damaged file can raise any exception in a decoder
        return BadImage(index, describe_error(error))
    return None


def check_data(
    path: Annotated[Path, POSITIONAL],
    out: Path = Path("data_check"),
    workers: int = os.cpu_count() or 1,
    most_bad: float = 0.01,
    most_pixels: int = MOST_PIXELS,
) -> None:
    """Reads every image once; writes a list of the good images and a report with each bad image and the reason.

    Ends with an error if too large a share of them is bad.

    Args:
        path: folder of images, folder of tar shards, shard, list of files, or my_file.py:my_function, which returns a data
            set.
        out: folder for bad_files.tsv and clean.txt (clean.index for shards; none for a data set), which Data.path takes.
        workers: threads; a data set is read by one.
        most_bad: share of bad images that is accepted.
        most_pixels: an image of more pixels is bad, as in a run whose Data.most_pixels is this.
    """
    result = check_images(open_source(path, most_pixels), out, workers)
    clean = result.clean or "leave those out of the data set"
    print(f"{len(result.bad)} of {result.images} images are bad; report: {result.report}; clean: {clean}")
    if result.bad_share > most_bad:
        rule = f"check_data: at most {most_bad:.2%} of the images may be bad"
        remedy = f"read {result.report}, then repair the data or {f'train on {clean}' if result.clean else clean}"
        raise SystemExit(sentence(rule, f"{result.bad_share:.2%}", remedy))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m patchlight.data.check_data") -> None:
    call(check_data, sys.argv[1:] if arguments is None else arguments, prog)


if __name__ == "__main__":
    main()
