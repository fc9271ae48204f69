"""Tables and plots, drawn from CSV rows only."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .rows import CsvRow, median_ms, read_rows

RESULTS = Path("bench/results")  # committed


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
    medians = [median_ms(row) for row in rows]
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
