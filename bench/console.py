"""Tables of measured rows on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .rows import Row


def wide_console() -> Console:
    """Wide enough for every table, also where the output is a pipe; shows texts of errors as they are."""
    return Console(width=max(120, Console().width), markup=False, emoji=False)


def print_op_rows(rows: Sequence[Row]) -> None:
    """One table per case: time, ratio to the first provider, share of the floor, memory."""
    console = wide_console()
    for case in dict.fromkeys((row["op"], row["case"], row["dtype"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["op"], row["case"], row["dtype"], row["mode"]) == case]
        timed = [row for row in chosen if row["status"] == "ok"]
        first = timed[0] if timed else chosen[0]
        title = f"{' '.join(case)} on {first['hardware']}, {first['threads']} threads"
        ratio = f"vs {first['provider']}"
        table = Table("provider", "median ms", "p20 - p80", ratio, "of floor", "peak extra MB", "error", title=title)
        for row in chosen:
            if row["status"] != "ok":
                table.add_row(row["provider"], "-", "", "", "", "", row["status"])
                continue
            memory = row["peak_extra_mb"]
            share = f"{row['percent_of_floor']:.0f} %" if "percent_of_floor" in row else ""
            table.add_row(
                row["provider"], f"{row['median_ms']:.4g}", f"{row['p20_ms']:.4g} - {row['p80_ms']:.4g}",
                f"{first['median_ms'] / row['median_ms']:.1f}x", share,
                "" if memory == "" else f"{memory:.2f}", f"{row['error']:.1e}",
            )  # fmt: skip
        console.print(table)
