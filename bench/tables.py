"""The tables of committed CSVs: beside them, and those of the main cases in the README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import gaps
from .report import RESULTS
from .rows import CsvRow, by_case, fastest_ours, fastest_peer, median_ms, read_rows

README, MARKS = Path("README.md"), ("<!-- numbers -->", "<!-- /numbers -->")
TABLES = "README.md"  # in the folder of results


def publish(readme: Path = README, results: Path = RESULTS) -> None:
    """Write all tables and the largest gaps of the committed CSVs beside them, and the tables of the main cases into the README.

    Args:
        readme: the file with the two marks.
        results: the folder of CSVs.
    """
    before, _, rest = readme.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n\n{tables(results, main_rows, results)}\n{MARKS[1]}{after}")
    (results / TABLES).write_text(all_tables(results))
    gaps.publish(results)


def all_tables(results: Path) -> str:
    head = "Written by `python -m bench readme` from the CSVs beside it. [The largest gaps](gaps.md) have a page of their own."
    return f"# Measured\n\n{head}\n\n{tables(results, list)}"


def tables(results: Path, choose: Callable[[list[CsvRow]], list[CsvRow]], link: Path = Path()) -> str:
    """A Markdown table per CSV, of the chosen rows; link: the folder of the CSVs, for a reader of the text."""
    lines = []
    for kind in KINDS:
        for path in sorted(results.glob(f"{kind}_*.csv")):
            conditions, head, make_lines = KINDS[kind]
            rows = read_rows(path)
            first = rows[0]
            if "mfu" in first:
                conditions, head, make_lines = GPU_STEP
            lines += [
                f"{first['hardware']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}, "
                f"{first['date']} ([`{path.name}`]({(link / path.name).as_posix()})); {conditions}:",
                "",
                f"| {' | '.join(head)} |",
                f"| {' | '.join(['---'] * len(head))} |",
                *[f"| {' | '.join(cells)} |" for cells in make_lines(choose(rows))],
                "",
            ]
    return "\n".join(lines)


def main_rows(rows: list[CsvRow]) -> list[CsvRow]:
    """Each op's first case in its longest mode; every step; loaders of files."""
    if "op" not in rows[0]:
        return [row for row in rows if row["mode"] == rows[0]["mode"]]
    first = {row["op"]: row["case"] for row in reversed(rows)}
    chosen = [row for row in rows if row["op"] == "step" or row["case"] == first[row["op"]]]
    longest = {row["op"]: row["mode"] for row in chosen}
    return [row for row in chosen if row["mode"] == longest[row["op"]]]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _time_and_ratio(row: CsvRow, ours: CsvRow) -> str:
    return f"{_number(median_ms(row))} ms ({median_ms(row) / median_ms(ours):.1f}x)"


def _memory(ours: CsvRow, official: CsvRow | None, column: str = "peak_extra_mb", unit: str = "MB") -> str:
    if not (official and ours[column] and official[column]):
        return ""
    return " : ".join(_number(float(row[column])) for row in (ours, official)) + f" {unit}"


def _op_lines(rows: list[CsvRow]) -> list[list[str]]:
    return [_op_line(*case, rows) for case, rows in by_case(rows).items()]


def _op_line(op: str, case: str, dtype: str, mode: str, rows: list[CsvRow]) -> list[str]:
    """The first provider is the official mathematics, which may not run; ours is the fastest of our implementations."""
    official = rows[0] if rows[0]["status"] == "ok" else None
    timed = [row for row in rows[1:] if row["status"] == "ok"]
    ours, best = fastest_ours(timed), fastest_peer(timed)
    if ours is None:
        return [f"`{op}`", f"{case} {dtype} {mode}", "cannot run", "", "", ""]
    return [
        f"`{op}`",
        f"{case} {dtype} {mode}",
        f"**{_number(median_ms(ours))} ms**",
        _time_and_ratio(official, ours) if official else "cannot run",
        f"{best['provider']} {_time_and_ratio(best, ours)}" if best else "",
        _memory(ours, official),
    ]


def _step_lines(rows: list[CsvRow]) -> list[list[str]]:
    return [_step_line(*case, rows) for case, rows in by_case(rows).items()]


def _step_line(op: str, case: str, dtype: str, mode: str, rows: list[CsvRow]) -> list[str]:
    """Only a method that extends a host has a ratio to it."""
    by_provider = {row["provider"]: row for row in rows}
    ours, official, ratio = by_provider["patchlight"], by_provider["official eager"], by_provider.get("over host")
    return [
        f"{case} {dtype}",
        f"**{_number(median_ms(ours))} ms**",
        f"{float(ours['images_per_s']):.3g}",
        _time_and_ratio(official, ours),
        f"{float(ratio['time_ratio']):.2f}x : {float(ratio['flop_ratio']):.2f}x" if ratio else "",
        _memory(ours, official),
    ]


def _gpu_step_lines(rows: list[CsvRow]) -> list[list[str]]:
    return [_gpu_step_line(case, dtype, rows) for (_, case, dtype, _), rows in by_case(rows).items()]


def _gpu_step_line(case: str, dtype: str, rows: list[CsvRow]) -> list[str]:
    """Ours is a graph of compiled branches; a provider that was not measured or failed has an empty cell."""
    timed = {row["provider"]: row for row in rows if row["status"] == "ok"}
    ours, official = timed.get("patchlight"), timed.get("official eager")
    if ours is None:
        return [f"{case} {dtype}", "not measured", *[""] * (len(GPU_STEP_HEAD) - 2)]
    others = [timed.get(name) for name in ("official eager", "official compiled + SDPA", "patchlight launched")]
    return [
        f"{case} {dtype}",
        f"**{_number(median_ms(ours))} ms**",
        f"{float(ours['images_per_s']):.0f}",
        f"{float(ours['mfu']):.0%}",
        f"{_number(float(ours['device_ms']))} ms, {ours['launches']}",
        *(_time_and_ratio(row, ours) if row else "" for row in others),
        _memory(ours, official, "peak_gib", "GiB"),
    ]


def _loader_lines(rows: list[CsvRow]) -> list[list[str]]:
    """A line per mode and loader of ours; the first provider is what most projects use."""
    peers = {row["mode"]: row for row in rows[::-1] if not row["provider"].startswith("patchlight")}
    return [
        _loader_line(row, peers[row["mode"]]) for row in rows if row is not peers[row["mode"]] and row["status"] == "ok"
    ]


def _loader_line(row: CsvRow, peer: CsvRow) -> list[str]:
    speed, usual = float(row["images_per_s"]), float(peer["images_per_s"])
    return [
        row["mode"],
        row["provider"],
        f"**{speed:.0f}**",
        f"{usual:.0f} ({speed / usual:.1f}x)",
        *[f"{float(either['cpu_ms_per_image']):.3g} ms" for either in (row, peer)],
    ]


OP_HEAD = ("op", "case", "ours", "official", "fastest other peer", "peak memory, ours : official")
STEP_HEAD = (
    "step", "ours", "images/s", "official eager", "over its host alone, time : FLOPs", "peak memory, ours : official"
)  # fmt: skip
LOADER_HEAD = ("pictures", "loader", "images/s", "DataLoader with PIL", "CPU per image", "PIL's")
GPU_STEP_HEAD = (
    "step", "ours, one graph", "images/s", "MFU", "on the device, launches", "official eager", "official compiled",
    "ours, launched", "peak memory, ours : official",
)  # fmt: skip
RUN = "medians of one interleaved run"
# By the start of a CSV's name: the conditions, the table's head, and what makes its lines.
KINDS: dict[str, tuple[str, tuple[str, ...], Callable[[list[CsvRow]], list[list[str]]]]] = {
    "ops": (f"{RUN}, inputs not in a cache", OP_HEAD, _op_lines),
    "step": (f"{RUN}, the same weights and crops", STEP_HEAD, _step_lines),
    "update": (f"{RUN}, the same gradients", OP_HEAD, _op_lines),
    "loader": (f"{RUN}, 2 x 224 + 8 x 96 of 500 x 375", LOADER_HEAD, _loader_lines),
    "evaluation": (RUN, OP_HEAD, _op_lines),
}
# Where the step's CSV was written on a GPU.
GPU_STEP = ("wall clock, one provider after another, the same weights and crops", GPU_STEP_HEAD, _gpu_step_lines)
