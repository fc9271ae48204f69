"""Counts tries: a line for each as it ends, and a table."""

from __future__ import annotations

import time
from collections import defaultdict

from faults.tiny import Outcome
from rich.console import Console
from rich.table import Table


class Tally:
    """The outcomes of all rows."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Outcome]] = defaultdict(list)
        self.seconds: dict[str, float] = {}
        self.name, self.planned, self.began = "", 0, 0.0

    @property
    def lost(self) -> int:
        return sum(bool(outcome.lost) for outcomes in self.rows.values() for outcome in outcomes)

    def begin(self, name: str, planned: int) -> None:
        """The outcomes that follow belong to this row."""
        self.name, self.planned, self.began = name, planned, time.perf_counter()
        self.rows[name] = []

    def add(self, outcome: Outcome) -> None:
        """Prints a line."""
        outcomes = self.rows[self.name]
        outcomes.append(outcome)
        self.seconds[self.name] = time.perf_counter() - self.began
        state = (
            f"LOST: {outcome.lost}"
            if outcome.lost
            else f"skipped: {outcome.skipped}"
            if outcome.skipped
            else "survived"
        )
        line = f"{self.name} {len(outcomes)}/{self.planned}  {outcome.what}  {outcome.result}  {state}"
        print(line.replace("\n", " "), flush=True)

    def print_table(self) -> None:
        """Tried, survived, lost."""
        table = Table("row", *(name for name in ("tried", "survived", "lost", "skipped", "seconds")), title="faults")
        for name, outcomes in self.rows.items():
            lost = sum(bool(outcome.lost) for outcome in outcomes)
            skipped = sum(bool(outcome.skipped) for outcome in outcomes)
            tried = len(outcomes) - skipped
            cells = (tried, tried - lost, lost, skipped, round(self.seconds.get(name, 0)))
            table.add_row(name, *map(str, cells))
        Console().print(table)
