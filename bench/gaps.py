"""The largest gaps, from the committed CSVs: how far our forms are above the floor, and where a peer is faster."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from .report import RESULTS, pyplot
from .rows import OURS, by_case, fastest_ours, fastest_peer, median_ms, read_rows

PAGE, REASONS = "gaps.md", "gaps.toml"  # in the folder of results
UNKNOWN = "nobody has written why yet."
FAR = 3.0  # times the floor, from which a case is on the page
HEAD = f"""# The largest gaps

Written by `python -m bench readme` from the CSVs and `gaps.toml` beside it. The floor is the time that the least bytes and the
flops take at the machine's measured copy and product rates (what reads more than it writes may pass a copy). Listed are the
cases in which our fastest form takes {FAR:g} times the floor or more, or a peer is faster (**bold**). The reasons come from
reading the code and its counts; nobody has profiled these cases.
"""


@dataclass(frozen=True, slots=True)
class Gap:
    """Our fastest form in a case, the floor, and the fastest peer."""

    op: str
    case: str
    hardware: str
    form: str
    ms: float
    floor_ms: float
    peer: str
    peer_ms: float

    @property
    def of_floor(self) -> float:
        return self.ms / self.floor_ms

    @property
    def of_peer(self) -> float:
        return self.ms / self.peer_ms

    @property
    def is_large(self) -> bool:
        return self.of_floor >= FAR or self.of_peer > 1


def gaps(path: Path) -> list[Gap]:
    """Each case of a CSV, the largest gap first."""
    timed = [row for row in read_rows(path) if row["status"] == "ok" and row.get("floor_ms")]
    found = []
    for (op, *case), rows in by_case(timed).items():
        ours, peer = fastest_ours(rows), fastest_peer(rows)
        if ours and peer:
            form = ours["provider"].removeprefix(OURS).strip() or OURS
            times = median_ms(ours), float(ours["floor_ms"])
            found.append(Gap(op, " ".join(case), ours["hardware"], form, *times, peer["provider"], median_ms(peer)))
    return sorted(found, key=lambda gap: -gap.of_floor)


def sources(results: Path) -> list[Path]:
    """The CSVs with floors: operations and the update, GPUs first."""
    found = [*results.glob("ops_*.csv"), *results.glob("update_*.csv")]
    return sorted(found, key=lambda path: (path.stem.endswith("cpu"), path.stem))


def reasons(results: Path) -> dict[str, dict[str, str]]:
    """Why an operation is where it is, and what would help, by CSV."""
    return tomllib.loads((results / REASONS).read_text())


def page(results: Path = RESULTS) -> str:
    """The page's text: a plot, a table and the reasons for each CSV."""
    lines = [HEAD]
    why = reasons(results)
    for path in sources(results):
        all_gaps = gaps(path)
        large = [gap for gap in all_gaps if gap.is_large]
        lines += [f"## {all_gaps[0].hardware}: `{path.name}`", ""]
        lines += [f"![{path.stem}: share of the floor]({picture(path)})", ""]
        lines += [f"{len(large)} of {len(all_gaps)} cases:" if large else f"None of {len(all_gaps)} cases.", ""]
        if large:
            lines += ["| op | case | form | ours | floor | ours : floor | fastest peer |", f"|{' --- |' * 7}"]
            lines += [_line(gap) for gap in large] + [""]
            known = why.get(path.stem, {})
            lines += [f"* `{op}`: {known.get(op, UNKNOWN)}" for op in dict.fromkeys(gap.op for gap in large)] + [""]
    return "\n".join(lines)


def picture(path: Path) -> str:
    """The name of a CSV's plot, beside it."""
    return f"floor_{path.stem}.png"


def _line(gap: Gap) -> str:
    peer = f"{gap.peer} {gap.peer_ms / gap.ms:.2f}x"
    peer = f"**{peer}**" if gap.of_peer > 1 else peer
    times = " | ".join(f"{ms:.3g} ms" for ms in (gap.ms, gap.floor_ms))
    return f"| `{gap.op}` | {gap.case} | {gap.form} | {times} | {gap.of_floor:.1f}x | {peer} |"


def draw(path: Path, to: Path) -> None:
    """Horizontal bars, by case: which share of the floor's speed our form reaches, and the fastest peer as a mark."""
    plt = pyplot()
    rows = gaps(path)[::-1]
    figure, axis = plt.subplots(figsize=(10, 0.26 * len(rows) + 1.3), layout="constrained")
    places = range(len(rows))
    shares = [100 / gap.of_floor for gap in rows]
    colors = ["#c92a2a" if gap.of_peer > 1 else "#d9480f" if gap.is_large else "#f08c00" for gap in rows]
    axis.barh(places, shares, color=colors, height=0.7)
    axis.scatter(
        [100 * gap.floor_ms / gap.peer_ms for gap in rows], places, marker="|", s=90, color="#212529", zorder=3
    )
    axis.axvline(100, color="#1971c2", linestyle="--", linewidth=1.5)
    for place, share, gap in zip(places, shares, rows, strict=True):
        end = share * gap.of_peer if 1 < gap.of_peer < 1.3 else share  # behind a mark that is near
        axis.annotate(
            f"{share:.0f} %", (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(places, [f"{gap.op}  {gap.case}" for gap in rows], fontsize=8)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set_xlim(0, max(105, max(shares) * 1.1))
    axis.set_xlabel("% of the floor's speed")
    what = "bars: ours; black marks: the fastest peer; red: it is faster"
    figure.suptitle(f"{rows[0].hardware}, {path.name}; {what}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=110)
    plt.close(figure)


def publish(results: Path = RESULTS) -> None:
    """Writes the page, and a plot per CSV."""
    (results / PAGE).write_text(page(results))
    for path in sources(results):
        draw(path, results / picture(path))
