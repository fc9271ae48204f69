"""Tables and plots, drawn from CSV rows only."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path


def draw(rows: Path = Path("bench/out/ops.csv"), out: Path = Path("bench/out")) -> None:
    """Draw one bar chart per op (time of each provider against the floor) and a Markdown table.

    Args:
        rows: the CSV of `python -m bench ops`.
        out: where the pictures and the table go.
    """
    if not rows.exists():
        raise SystemExit(f"{rows} is not there; measure first: python -m bench ops")
    with rows.open() as file:
        timed = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    if not timed:
        raise SystemExit(f"{rows} holds no timed row; nothing to draw")
    out.mkdir(parents=True, exist_ok=True)
    by_op: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in timed:
        by_op[row["op"]][f"{row['case']} {row['dtype']} {row['mode']}"].append(row)
    for op, cases in by_op.items():
        path = out / f"{op}.png"
        picture(op, cases, path)
        print(f"plot: {path}")
    (out / "ops.md").write_text(markdown(by_op))
    print(f"table: {out / 'ops.md'}")


def markdown(by_op: dict) -> str:
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
                lines.append(
                    f"| {case} | {row['provider']} | {row['median_ms']} | {row['p20_ms']} - {row['p80_ms']} | {ratio:.1f}x | "
                    f"{float(row['percent_of_floor']):.0f} % | {row['peak_extra_mb']} |"
                )
        lines.append("")
    return "\n".join(lines)


README, RESULTS, MARKS = Path("README.md"), Path("bench/results"), ("<!-- numbers -->", "<!-- /numbers -->")


def readme(readme: Path = README, results: Path = RESULTS) -> None:
    """Replace the numbers in the README by those of the committed CSVs.

    Args:
        readme: the file with the two marks.
        results: the folder of CSVs.
    """
    before, _, rest = readme.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n\n{headlines(results)}\n{MARKS[1]}{after}")


def headlines(results: Path) -> str:
    """A Markdown table per CSV: one line per case, ours against the official mathematics and the fastest other peer."""
    lines = []
    for path in sorted(results.glob("*.csv")):
        with path.open() as file:
            found = list(csv.DictReader(file))
        first = found[0]
        lines += [
            f"{first['hardware']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}, "
            f"{first['date']} ([`{path.name}`]({path.as_posix()})); medians of one interleaved run, inputs not in a cache:",
            "",
            "| op | case | ours | official | fastest other peer | peak memory, ours : official |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        cases: dict[tuple, list[dict]] = defaultdict(list)
        for row in found:
            cases[row["op"], row["case"], row["dtype"], row["mode"]].append(row)
        lines += [_headline(*case, rows) for case, rows in cases.items()]
        lines.append("")
    return "\n".join(lines)


def _headline(op: str, case: str, dtype: str, mode: str, rows: list[dict]) -> str:
    """Ours is the default implementation, or the only one there is."""
    time = lambda row: float(row["median_ms"])
    ours = min((row for row in rows if row["provider"].startswith("patchlight")), key=time)
    official = next((row for row in rows if row["provider"] == "official eager"), None)
    others = [
        row for row in rows if row is not official and not row["provider"].startswith(("patchlight", "reference"))
    ]
    best = min(others, key=time, default=None)
    against = lambda row: f"{time(row):.3g} ms ({time(row) / time(ours):.1f}x)"
    memory = [row and row["peak_extra_mb"] and f"{float(row['peak_extra_mb']):.3g}" for row in (ours, official)]
    cells = [
        f"`{op}`",
        f"{case} {dtype} {mode}",
        f"**{time(ours):.3g} ms**",
        against(official) if official else "cannot run",
        f"{best['provider']} {against(best)}" if best else "",
        f"{memory[0]} : {memory[1]} MB" if all(memory) else "",
    ]
    return f"| {' | '.join(cells)} |"


def picture(op: str, cases: dict[str, list[dict]], path: Path) -> None:
    """Horizontal bars per case on a logarithmic axis, p20 to p80 as whiskers, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        medians = [float(row["median_ms"]) for row in rows]
        spread = [
            [m - min(m, float(row["p20_ms"])) for m, row in zip(medians, rows, strict=True)],
            [max(m, float(row["p80_ms"])) - m for m, row in zip(medians, rows, strict=True)],
        ]
        colors = ["#d9480f" if row["provider"].startswith("patchlight") else "#adb5bd" for row in rows]
        axis.barh(range(len(rows)), medians, xerr=spread, color=colors, ecolor="#495057", capsize=2)
        floor = float(rows[0]["floor_ms"])
        axis.axvline(floor, color="#1971c2", linestyle="--", linewidth=1.5)
        axis.annotate(
            f"floor {floor:.3g} ms",
            (floor, len(rows) - 0.45),
            color="#1971c2",
            fontsize=8,
            ha="left",
            xytext=(3, 0),
            textcoords="offset points",
        )
        axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(floor / 1.5, max(medians) * 2.2)
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
    axes[-1, 0].set_xlabel("milliseconds (lower is better)")
    first = next(iter(cases.values()))[0]
    figure.suptitle(
        f"{op}: {first['hardware']}, torch {first['torch']}, commit {first['commit']}, {first['date']}", fontsize=11
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
