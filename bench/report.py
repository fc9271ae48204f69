"""Tables and plots, drawn from CSV rows only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .rows import CsvRow, read_rows

README, RESULTS, MARKS = Path("README.md"), Path("bench/results"), ("<!-- numbers -->", "<!-- /numbers -->")
TABLES = "README.md"  # in the folder of results


def draw(rows: Path = Path("bench/out/ops.csv"), out: Path = Path("bench/out")) -> None:
    """Draw one bar chart per op or step (time of each provider, against the floor if there is one) and a Markdown table.

    Args:
        rows: the CSV of `python -m bench ops` or `step`.
        out: the folder of the pictures and the table.
    """
    if not rows.exists():
        raise SystemExit(f"report: rows must be a CSV file, got {rows}; measure first: python -m bench {rows.stem}.")
    timed = [row for row in read_rows(rows) if row["status"] == "ok"]
    if not timed:
        raise SystemExit(f"report: rows must hold a timed row, got none in {rows}; measure again.")
    out.mkdir(parents=True, exist_ok=True)
    by_op: dict[str, dict[str, list[CsvRow]]] = defaultdict(lambda: defaultdict(list))
    for row in timed:
        by_op[row["op"]][f"{row['case']} {row['dtype']} {row['mode']}"].append(row)
    for op, cases in by_op.items():
        path = out / f"{op}.png"
        draw_chart(op, cases, path)
        print(f"plot: {path}")
    table = out / f"{rows.stem}.md"
    table.write_text(markdown(by_op))
    print(f"table: {table}")


def markdown(by_op: dict[str, dict[str, list[CsvRow]]]) -> str:
    lines = []
    for op, cases in by_op.items():
        first = next(iter(cases.values()))[0]
        versions = f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}, {first['date']}"
        lines += [f"## {op}", "", f"{first['hardware']}, {first['threads']} threads, {versions}.", ""]
        lines.append("| case | provider | median ms | p20 - p80 | vs first | of floor | peak extra MB |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for case, rows in cases.items():
            for row in rows:
                ratio = float(rows[0]["median_ms"]) / float(row["median_ms"])
                share = f"{float(row['percent_of_floor']):.0f} %" if row.get("percent_of_floor") else ""
                lines.append(
                    f"| {case} | {row['provider']} | {row['median_ms']} | {row['p20_ms']} - {row['p80_ms']} | {ratio:.1f}x | "
                    f"{share} | {row.get('peak_extra_mb', '')} |"
                )
        lines.append("")
    return "\n".join(lines)


def publish(readme: Path = README, results: Path = RESULTS) -> None:
    """Write all tables of the committed CSVs beside them, and those of the main cases into the README.

    Args:
        readme: the file with the two marks.
        results: the folder of CSVs.
    """
    before, _, rest = readme.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n\n{tables(results, main_rows, results)}\n{MARKS[1]}{after}")
    (results / TABLES).write_text(all_tables(results))


def all_tables(results: Path) -> str:
    return f"# Measured\n\nWritten by `python -m bench readme` from the CSVs beside it.\n\n{tables(results, list)}"


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


def _median_ms(row: CsvRow) -> float:
    return float(row["median_ms"])


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _time_and_ratio(row: CsvRow, ours: CsvRow) -> str:
    return f"{_number(_median_ms(row))} ms ({_median_ms(row) / _median_ms(ours):.1f}x)"


def _memory(ours: CsvRow, official: CsvRow | None, column: str = "peak_extra_mb", unit: str = "MB") -> str:
    if not (official and ours[column] and official[column]):
        return ""
    return " : ".join(_number(float(row[column])) for row in (ours, official)) + f" {unit}"


def _cases(rows: list[CsvRow]) -> dict[tuple[str, str, str, str], list[CsvRow]]:
    cases: dict[tuple[str, str, str, str], list[CsvRow]] = defaultdict(list)
    for row in rows:
        cases[row["op"], row["case"], row["dtype"], row["mode"]].append(row)
    return cases


def _op_lines(rows: list[CsvRow]) -> list[list[str]]:
    return [_op_line(*case, rows) for case, rows in _cases(rows).items()]


def _op_line(op: str, case: str, dtype: str, mode: str, rows: list[CsvRow]) -> list[str]:
    """The first provider is the official mathematics, which may not run; ours is the fastest of our implementations."""
    official = rows[0] if rows[0]["status"] == "ok" else None
    timed = [row for row in rows[1:] if row["status"] == "ok"]
    ours = min((row for row in timed if row["provider"].startswith("patchlight")), key=_median_ms, default=None)
    if ours is None:
        return [f"`{op}`", f"{case} {dtype} {mode}", "cannot run", "", "", ""]
    others = [row for row in timed if not row["provider"].startswith(("patchlight", "reference"))]
    best = min(others, key=_median_ms, default=None)
    return [
        f"`{op}`",
        f"{case} {dtype} {mode}",
        f"**{_number(_median_ms(ours))} ms**",
        _time_and_ratio(official, ours) if official else "cannot run",
        f"{best['provider']} {_time_and_ratio(best, ours)}" if best else "",
        _memory(ours, official),
    ]


def _step_lines(rows: list[CsvRow]) -> list[list[str]]:
    return [_step_line(*case, rows) for case, rows in _cases(rows).items()]


def _step_line(op: str, case: str, dtype: str, mode: str, rows: list[CsvRow]) -> list[str]:
    """Only a method that extends a host has a ratio to it."""
    by_provider = {row["provider"]: row for row in rows}
    ours, official, ratio = by_provider["patchlight"], by_provider["official eager"], by_provider.get("over host")
    return [
        f"{case} {dtype}",
        f"**{_number(_median_ms(ours))} ms**",
        f"{float(ours['images_per_s']):.3g}",
        _time_and_ratio(official, ours),
        f"{float(ratio['time_ratio']):.2f}x : {float(ratio['flop_ratio']):.2f}x" if ratio else "",
        _memory(ours, official),
    ]


def _gpu_step_lines(rows: list[CsvRow]) -> list[list[str]]:
    return [_gpu_step_line(case, dtype, rows) for (_, case, dtype, _), rows in _cases(rows).items()]


def _gpu_step_line(case: str, dtype: str, rows: list[CsvRow]) -> list[str]:
    """Ours is a graph of compiled branches; a provider that was not measured or failed has an empty cell."""
    timed = {row["provider"]: row for row in rows if row["status"] == "ok"}
    ours, official = timed.get("patchlight"), timed.get("official eager")
    if ours is None:
        return [f"{case} {dtype}", "not measured", *[""] * (len(GPU_STEP_HEAD) - 2)]
    others = [timed.get(name) for name in ("official eager", "official compiled + SDPA", "patchlight launched")]
    return [
        f"{case} {dtype}",
        f"**{_number(_median_ms(ours))} ms**",
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


def draw_chart(op: str, cases: dict[str, list[CsvRow]], path: Path) -> None:
    """Horizontal bars per case on a logarithmic axis, p20 to p80 as whiskers, the floor, if there is one, as a line."""
    plt = pyplot()
    heights = [len(rows) for rows in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(10, 0.42 * sum(heights) + 1.0 * len(cases) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=True):
        _draw_case(axis, case, rows)
    axes[-1, 0].set_xlabel("milliseconds (lower is better)")
    first = next(iter(cases.values()))[0]
    figure.suptitle(
        f"{op}: {first['hardware']}, torch {first['torch']}, commit {first['commit']}, {first['date']}", fontsize=11
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _draw_case(axis: Any, case: str, rows: list[CsvRow]) -> None:
    medians = [_median_ms(row) for row in rows]
    spread = [
        [m - min(m, float(row["p20_ms"])) for m, row in zip(medians, rows, strict=True)],
        [max(m, float(row["p80_ms"])) - m for m, row in zip(medians, rows, strict=True)],
    ]
    colors = ["#d9480f" if row["provider"].startswith("patchlight") else "#adb5bd" for row in rows]
    axis.barh(range(len(rows)), medians, xerr=spread, color=colors, ecolor="#495057", capsize=2)
    least = min(medians)
    if rows[0].get("floor_ms"):
        least = float(rows[0]["floor_ms"])
        _draw_floor(axis, least, len(rows))
    axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(least / 1.5, max(medians) * 2.2)
    for position, median in enumerate(medians):
        axis.annotate(
            f"{median:.3g} ms  {medians[0] / median:.1f}x",
            (median, position),
            va="center",
            fontsize=8,
            xytext=(8, 0),
            textcoords="offset points",
        )
    axis.set_title(case, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_floor(axis: Any, floor_ms: float, bars: int) -> None:
    axis.axvline(floor_ms, color="#1971c2", linestyle="--", linewidth=1.5)
    axis.annotate(
        f"floor {floor_ms:.3g} ms",
        (floor_ms, bars - 0.45),
        color="#1971c2",
        fontsize=8,
        ha="left",
        xytext=(3, 0),
        textcoords="offset points",
    )
