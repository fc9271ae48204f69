"""Every row of every table and figure of the papers: its network, its evaluation, its numbers, from the files in papers/."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from ..checks import check
from ..values import nearest

PAPERS = {  # the file of a paper, and how it is cited
    "released": "released",
    "selfpatch": "SelfPatch",
    "pass": "PASS",
    "pqcl": "PQCL",
    "sere": "SERE",
}


@dataclass(frozen=True)
class Measure:
    """What some columns of a table measure."""

    title: str
    evaluate: tuple[str, ...]
    """The words after `patchlight evaluate`, but for --checkpoint. A step with --save FOLDER makes the next one's checkpoint."""
    metrics: tuple[str, ...]
    """The numbers' names in results, in the table's order; none for pictures."""
    task: str = ""
    """In results; empty where an evaluation has no such number: pictures, and test sets whose labels a server has."""
    data: str = ""
    """In results."""
    shown: tuple[str, ...] = ()
    """The numbers' names on a page, where they differ."""

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers' names on a page."""
        return self.shown or self.metrics


@dataclass(frozen=True)
class Network:
    """A pretrained network: trained by a recipe, or published by others."""

    name: str
    method: str
    backbone: str
    epochs: int
    """Of pretraining; 0 where the source does not state them."""
    train: str = ""
    """The words after `patchlight train`, without the images."""
    published: str = ""
    """Whose file the paper took; a recipe, if there is one, is then the nearest."""
    checkpoint: str = ""
    """What --checkpoint takes, where it is neither trained nor a file."""
    images: str = "IMAGENET/train"
    """What it is trained on."""
    stand_in: str = ""
    """The architecture that a small run takes in place of a file."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    network: Network
    flags: str = ""
    """Of the training, beyond the network's own."""
    columns: tuple[str, ...] = ()
    """What the table's further columns say."""
    values: tuple[float | None, ...] = ()
    """In percent, for the numbers of all measures; None where the paper prints none."""

    @property
    def train(self) -> str:
        """The words after `patchlight train`, without the images; empty where nothing is trained."""
        return f"{self.network.train} {self.flags}".strip()

    @property
    def folder(self) -> str:
        """A name for the run, the same for equal trainings."""
        flags = re.sub(r"--(?:[\w-]+\.)*(?:\d+\.)?", "", self.flags)
        return "-".join(re.findall(r"[\w.]+", f"{self.network.name} {flags}"))


@dataclass(frozen=True)
class PaperTable:
    """A table or a figure, or a part of one."""

    paper: str
    name: str
    about: str
    section: str
    """Of the text that describes it."""
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]
    part: str = ""
    columns: tuple[str, ...] = ()
    """Heads of columns that distinguish rows."""
    ablation: bool = False

    @property
    def source(self) -> str:
        return f"{self.paper} {self.name}" if self.paper == "released" else f"{self.paper}, {self.name}"

    @property
    def title(self) -> str:
        return f"{self.source} {self.part}".strip()

    def values_of(self, row: Row, measure: Measure) -> tuple[float | None, ...]:
        """The row's numbers of a measure."""
        start = sum(len(other.metrics) for other in self.measures[: self.measures.index(measure)])
        return row.values[start : start + len(measure.metrics)]


@dataclass(frozen=True)
class PaperNumbers:
    """The numbers of one row that one evaluation has too."""

    task: str
    data: str
    method: str
    backbone: str
    epochs: int | None
    """Of pretraining; None where the source does not state them."""
    metrics: dict[str, float]
    """In percent."""
    source: str
    columns: dict[str, str] = field(default_factory=dict)
    """What distinguishes the row from others, by the heads of the table's columns."""
    ablation: bool = False
    trained: bool = True
    """Whether a recipe makes the network, or one like it."""


@cache
def all_tables() -> tuple[PaperTable, ...]:
    """Every table and figure, paper by paper."""
    measures = {name: Measure(**_tuples(given)) for name, given in _read("measures").items()}
    networks = {name: Network(name, **given) for name, given in _read("networks").items()}
    return tuple(
        _table(paper, given, measures, networks) for file, paper in PAPERS.items() for given in _read(file)["table"]
    )


def _read(name: str) -> dict:
    return tomllib.loads((Path(__file__).parent / "papers" / f"{name}.toml").read_text(encoding="utf-8"))


def _tuples(given: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _table(paper: str, given: dict, measures: dict[str, Measure], networks: dict[str, Network]) -> PaperTable:
    chosen = tuple(measures[name] for name in given["measures"])
    rows = tuple(_row(row, networks) for row in given["rows"])
    return PaperTable(paper, **_tuples(given) | {"measures": chosen, "rows": rows})


def _row(given: dict, networks: dict[str, Network]) -> Row:
    values = tuple(None if math.isnan(value) else value for value in given.get("values", ()))
    return Row(networks[given["network"]], given.get("flags", ""), tuple(given.get("columns", ())), values)


def tables_named(name: str) -> list[PaperTable]:
    """The tables of a paper ("SERE"), one table or figure ("SERE 5", "PQCL Figure 3"), or a part of one ("PASS Table 2 (a)")."""
    wanted = re.sub(r"[\s,]+", " ", name).strip().lower()
    found = [table for table in all_tables() if wanted in _names_of(table)]
    every = list(dict.fromkeys(known for table in all_tables() for known in _names_of(table, cased=True)))
    check(
        bool(found), "A table must be one of the papers'", repr(name), nearest(name, every, "SERE and SERE 5 are some")
    )
    return found


def _names_of(table: PaperTable, cased: bool = False) -> list[str]:
    """All that a table may be called."""
    names = [table.paper, f"{table.paper} {table.name}", f"{table.paper} {table.name} {table.part}".strip()]
    names += [name.replace(" Table ", " ") for name in names[1:]]
    names = [name.replace(",", "") for name in names]
    return names if cased else [name.lower() for name in names]


@cache
def all_paper_numbers() -> tuple[PaperNumbers, ...]:
    """The numbers of every row, for every evaluation that has them too."""
    return tuple(_all_numbers())


def _all_numbers() -> Iterator[PaperNumbers]:
    for table in all_tables():
        for row in table.rows:
            network, columns = row.network, dict(zip(table.columns, row.columns, strict=True))
            about = network.method, network.backbone, network.epochs or None
            for measure in table.measures:
                pairs = zip(measure.metrics, table.values_of(row, measure), strict=False)
                metrics = {name: value for name, value in pairs if value is not None}
                if measure.task and metrics:
                    flags = table.ablation, bool(network.train)
                    yield PaperNumbers(measure.task, measure.data, *about, metrics, table.title, columns, *flags)


def paper_numbers(task: str, data: str) -> list[PaperNumbers]:
    """The rows of a task on a data set."""
    return [row for row in all_paper_numbers() if (row.task, row.data) == (task, data)]


def main_numbers(task: str, data: str) -> list[PaperNumbers]:
    """The rows without ablations, those first whose network a recipe trains; equal rows of several tables are one."""
    found: list[PaperNumbers] = []
    for row in paper_numbers(task, data):
        same = (n for n, other in enumerate(found) if _same_network(row, other) and _has(other, row))
        number = next(same, None)
        if number is not None:
            found[number] = replace(found[number], source=f"{found[number].source}; {row.source}")
        elif not row.ablation:
            found.append(row)
    return sorted(found, key=lambda row: not row.trained)


def _same_network(row: PaperNumbers, other: PaperNumbers) -> bool:
    return (row.method, row.backbone, row.epochs) == (other.method, other.backbone, other.epochs)


def _has(row: PaperNumbers, other: PaperNumbers) -> bool:
    """Whether a row has all numbers of another one."""
    return other.metrics.items() <= row.metrics.items()
