"""The command lines that make a row of a table. Words in capital letters stand for folders of the user's."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluation.paper_numbers import Measure, PaperTable, Row

RUNS = "runs"
FILE = "FILE"  # in place of a published file
OWN = ("FINETUNED", "PREDICTIONS")  # folders that a step writes, named after its network


@dataclass(frozen=True)
class Place:
    """A row of a table, to name it."""

    table: PaperTable
    number: int
    """From 1."""

    @property
    def row(self) -> Row:
        return self.table.rows[self.number - 1]

    def __str__(self) -> str:
        heads = zip(self.table.columns, self.row.columns, strict=True)
        columns = ", ".join(f"{head} {value}" for head, value in heads if value)
        network = self.row.network
        return f"{self.table.title}, row {self.number}: {network.method}, {network.backbone}" + columns.join(
            (" (", ")") if columns else ("", "")
        )


def places(tables: list[PaperTable]) -> list[Place]:
    """Every row of some tables."""
    return [Place(table, number) for table in tables for number in range(1, len(table.rows) + 1)]


def training(row: Row) -> list[str]:
    """The words after `patchlight` that train a row's network; none where nothing trains it."""
    if not row.train:
        return []
    return ["train", *row.train.split(), "--data.path", row.network.images, "--output.folder", run_of(row)]


def run_of(row: Row) -> str:
    """The folder of a row's run."""
    return f"{RUNS}/{row.folder}"


def checkpoint_of(row: Row) -> str:
    """What --checkpoint takes."""
    return run_of(row) if row.train else row.network.checkpoint or FILE


def evaluations(row: Row, measure: Measure, checkpoint: str = "") -> list[list[str]]:
    """The words after `patchlight` of each step that measures a row. checkpoint: another one than the row's own."""
    checkpoint, base, found = checkpoint or checkpoint_of(row), run_of(row), []
    for step in measure.evaluate:
        words = [f"{base}-{word.lower()}" if word in OWN else word for word in step.split()]
        found.append(["evaluate", *words, "--checkpoint", checkpoint])
        if "--save" in words:
            checkpoint = base = words[words.index("--save") + 1]
    return found


def lines(place: Place) -> list[str]:
    """What to type for a row, with what it needs said."""
    row, network = place.row, place.row.network
    found = []
    if network.published:
        nearest = "; the nearest recipe:" if row.train else ""
        found.append(f"# the paper took a published {network.backbone} of {network.published}{nearest}")
    if row.train:
        found.append(" ".join(["patchlight", *training(row)]))
    steps = [" ".join(["patchlight", *words]) for m in place.table.measures for words in evaluations(row, m)]
    return [*found, *dict.fromkeys(steps)]
