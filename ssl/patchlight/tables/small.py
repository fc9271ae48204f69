"""Small runs of a row's commands: drawn images in place of the data, one step, the same network."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..evaluation.paper_numbers import Row
from .commands import Place, checkpoint_of, evaluations, run_of, training

LISTS = ("1percent.txt", "10percent.txt")  # of labels: an image of each class
DATA = "data"


@cache
def settings() -> dict:
    """What small.toml says."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def small_training(row: Row, out: Path) -> list[str]:
    """The words after `patchlight` that train a row's network for a step; none where nothing trains it."""
    words = training(row)
    if not words:
        return []
    given = settings()["train"]
    words[words.index("--data.path") + 1] = in_data(given["images"], out)
    words[words.index("--output.folder") + 1] = str(out / run_of(row))
    return [*words, *given["flags"].split()]


def small_evaluations(place: Place, out: Path) -> list[list[str]]:
    """The words after `patchlight` of every evaluation of a row, each once."""
    row = place.row
    stand_in = f"random:{row.network.stand_in}" if row.network.stand_in and not row.train else ""
    checkpoint, found = stand_in or checkpoint_of(row), []
    for measure in place.table.measures:
        for words in evaluations(row, measure, checkpoint):
            folder = out / "results" / place.row.folder
            own = [str(out / word) if word.startswith(run_of(row)) else in_data(word, out) for word in words]
            small = [*own, *_flags(words[1:]), "--out", str(folder)]
            if small not in found:
                found.append(small)
    return found


def in_data(word: str, out: Path) -> str:
    """The drawn folder or the list of labels in place of a word that stands for one; other words as they are."""
    head = word.partition("/")[0]
    return str(out / DATA / word) if head in settings()["data"] or word in LISTS else word


def _flags(words: Sequence[str]) -> list[str]:
    known = settings()["evaluate"]
    fitting = [name for name in known if words[: len(name.split())] == name.split()]
    return known[max(fitting, key=len)].split() if fitting else []


def data_names(words: Sequence[str]) -> list[str]:
    """The data sets that a row's words stand for."""
    heads = ["IMAGENET" if word in LISTS else word.partition("/")[0] for word in words]
    return [name for name in dict.fromkeys(heads) if name in settings()["data"]]


def rendering(name: str, out: Path) -> list[str]:
    """The words after `patchlight` that draw a data set."""
    layout, *flags = settings()["data"][name].split()
    return ["evaluate", "render", layout, str(out / DATA / name), *flags]


def write_lists(out: Path) -> None:
    """Lists of labels that name an image of each class."""
    folders = sorted(path for path in (out / DATA / "IMAGENET" / "train").iterdir() if path.is_dir())
    names = [next(iter(sorted(folder.iterdir()))).name for folder in folders]
    for name in LISTS:
        (out / DATA / name).write_text("\n".join(names) + "\n", encoding="utf-8")
