"""The report of a run: one HTML file without outside resources, made from the files in the run's folder only."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from html import escape
from itertools import islice
from pathlib import Path

from ..durable import write_whole
from .charts import legend, line_chart, percent, short
from .console import is_term
from .log_file import number
from .run_folder import (
    BEST_FILE,
    DIAGNOSES_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FOLDER,
    KERNELS_FILE,
    PICTURES_FOLDER,
    PROFILE_FILE,
    PROFILE_FOLDER,
    REPORT_FILE,
    RUN_FILE,
    TRACE_FILE,
    read_json,
)
from .run_summary import LogSummary, RunSummary
from .series import Series
from .style import SCRIPT, STYLE

_MOST_PICTURES = 4  # of one kind: the first, the newest, and others in between
_MOST_DOTS = 50
MOST_SHOWN = 10  # operations or kernels of a profile
_MOST_PICTURE_BYTES = 8 * 2**20  # of a file that is put into the page


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run's folder, from the files there, and returns its path."""
    path = Path(folder) / REPORT_FILE
    write_whole(path, build_report(RunSummary(Path(folder)).update()))
    return path


def build_report(summary: RunSummary) -> str:
    """The page as text. Neither its size nor its time grows with the run."""
    folder, problems = summary.folder, summary.problems()
    run, environment = (_read(folder / name, problems) for name in (RUN_FILE, ENVIRONMENT_FILE))
    lines, knn = summary.metrics, summary.knn
    profile = _profile(folder / PROFILE_FOLDER, problems)
    sections = [
        _head(folder, run, lines),
        _tiles(lines, knn, summary.best()),
        _diagnoses(summary.diagnoses),
        _section("Damaged files", _list(problems)),
        _section(
            "k-NN accuracy and attention", _knn_chart(knn, lines) + _pictures(folder / PICTURES_FOLDER, "attention")
        ),
        _section("Evaluations", _evaluations(folder / EVALUATION_FOLDER)),
        _section("Losses", _loss_charts(lines)),
        _section("Schedules and gradients", _other_charts(lines)),
        _section("Speed and data", _data_facts(run, lines) + _speed_charts(lines)),
        _section("Profile", profile),
        _section("Crops", _pictures(folder / PICTURES_FOLDER, "crops")),
        _section("Configuration", _table(_flat(run), "run.json")),
        _section("Environment", _table(_flat(environment), "environment.json")),
    ]
    title = escape(f"{folder.name} · patchlight")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _read(path: Path, problems: list[str]) -> dict:
    """The object in a file; if it cannot be read, that is a problem and the object is empty."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _head(folder: Path, run: dict, lines: LogSummary) -> str:
    """Name, method, and how far the run is."""
    model, last = _part(run, "model"), lines.last
    options = _part(run, "objectives").get("options")
    kinds = [o.get("kind", "") for o in options if isinstance(o, dict)] if isinstance(options, list) else []
    methods = " + ".join(str(kind).removesuffix("Options") for kind in kinds)
    sizes = _part(model, "sizes")
    network = f"{model.get('arch')}/{model.get('patch_size')}" if model else ""
    network += f" ({', '.join(f'{name} {value}' for name, value in sizes.items())})" if sizes else ""
    parts = [str(part) for part in (methods, network, _part(run, "data").get("path")) if part]
    step, total, epoch, images = (number(last.get(name)) or 0 for name in ("step", "total", "epoch", "images"))
    state = "no log line yet"
    if total:
        state = "finished" if step >= total else "as of the last log line"
        state = f"step {step:,.0f} of {total:,.0f} · epoch {epoch:.1f} · {images:,.0f} images · {state}"
    done = percent(min(1.0, step / total)) if total > 0 else "0%"
    return (
        f"<header><h1>{escape(folder.name)}</h1><p>{escape(' · '.join(parts))}</p>"
        f'<div class="bar"><i style="width:{done}"></i></div><p class="state">{escape(state)}</p></header>'
    )


def _part(values: dict, name: str) -> dict:
    """A nested dictionary, empty if there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _tiles(lines: LogSummary, knn: LogSummary, kept: tuple[str, int, float] | None) -> str:
    """The most important numbers."""
    if not lines.last:
        return ""
    last, tiles = lines.last, []
    if names := _knn_names(knn):
        best = max(names, key=lambda name: number(knn.last.get(name)) or 0)
        first = number(knn.first.get(best))
        gain = f"from {percent(first)} at step {knn.first['step']:,}" if first is not None and knn.lines > 1 else ""
        now = number(knn.last.get(best))
        tiles.append((f"k-NN accuracy, k={best[1:]}", "not finite" if now is None else percent(now), gain))
    if kept is not None:
        tiles.append((f"best {kept[0]}", percent(kept[2]), f"step {kept[1]:,}, kept as {Path(BEST_FILE).stem}"))
    tiles.append(("loss", _number(last.get("loss")), f"from {_number(lines.first.get('loss'))}"))
    if (rate := _series(lines, "speed/images_per_second").median()) is not None:
        tiles.append(("images per second", short(rate), "median"))
    seconds, waited = number(last.get("seconds")) or 0.0, _series(lines, "data/wait_seconds").total
    tiles.append(("waiting for data", percent(waited / seconds if seconds else 0), f"{waited:.1f} s in all"))
    if (mfu := _series(lines, "speed/mfu").median()) is not None:
        tiles.append(("MFU", percent(mfu), "median; backbone only"))
    if (memory := number(last.get("memory/gib"))) is not None:
        tiles.append(("peak memory", f"{memory:.2f} GiB", "per process"))
    tiles.append(("time", _duration(seconds), f"{number(last.get('images')) or 0:,.0f} images"))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><em>{escape(note)}</em></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _diagnoses(diagnoses: LogSummary) -> str:
    if not diagnoses.lines:
        return ""
    items = "".join(
        f"<li><b>{escape(str(d.get('name')))}</b> at step {d['step']:,}: {escape(str(d.get('sentence')))}</li>"
        for d in diagnoses.recent
    )
    earlier = diagnoses.lines - len(diagnoses.recent)
    more = f"<p>{earlier} earlier ones are in {DIAGNOSES_FILE}.</p>" if earlier else ""
    return f'<section class="alarm"><h2>Diagnoses</h2><ul>{items}</ul>{more}</section>'


def _knn_chart(knn: LogSummary, lines: LogSummary) -> str:
    series = {f"k = {name[1:]}": _series(knn, name) for name in _knn_names(knn)}
    if not series:
        return ""
    chart = line_chart(series, number(lines.last.get("total")), percent, from_zero=True, dots=knn.lines <= _MOST_DOTS)
    return f'<div class="charts">{_card("k-NN accuracy of the teacher", legend(series) + chart)}</div>'


def _knn_names(knn: LogSummary) -> list[str]:
    return [name for name in knn.last if name[:1] == "k" and name[1:].isdigit()]


def _loss_charts(lines: LogSummary) -> str:
    """The weighted sum, each term, and each term over ln K."""
    if not lines.last:
        return ""
    names = [n for n in lines.series if "/" in n and is_term(n) and not n.endswith("/nonfinite")]
    ratios = [name for name in names if name.endswith("/ln_k")]
    cards = [_metric_card(lines, "loss", "loss (weighted sum)")]
    cards += [_metric_card(lines, name, name) for name in names if name not in ratios]
    if ratios:
        series = {name.removesuffix("/ln_k"): _series(lines, name) for name in ratios}
        chart = line_chart(series, number(lines.last.get("total")), reference=(1.0, "1: uniform, nothing learned"))
        cards.append(_card("loss / ln K", legend(series) + chart))
    return _grid(cards)


def _other_charts(lines: LogSummary) -> str:
    names = {
        "lr": "learning rate",
        "momentum": "teacher momentum",
        "weight_decay": "weight decay",
        "gradient/norm": "gradient norm",
        "teacher/spread": "spread of the teacher's summaries",
        "step/refused": "share of refused steps",
    }
    return _grid(_metric_card(lines, name, title) for name, title in names.items() if name in lines.series)


def _speed_charts(lines: LogSummary) -> str:
    charts: dict[str, tuple[str, Callable[[float], str] | None]] = {
        "speed/images_per_second": ("images per second, all processes", None),
        "data/wait_share": ("time spent waiting for data", percent),
        "speed/mfu": ("MFU, backbone only", percent),
        "memory/gib": ("peak memory per process, GiB", None),
    }
    return _grid(
        _metric_card(lines, name, title, write, from_zero=True)
        for name, (title, write) in charts.items()
        if name in lines.series
    )


def _data_facts(run: dict, lines: LogSummary) -> str:
    """Which loader ran and how long steps waited for it."""
    data, last = _part(run, "data"), lines.last
    if not data or not last:
        return ""
    steps, seconds = _series(lines, "steps").total, number(last.get("seconds")) or 0.0
    waited, worst = _series(lines, "data/wait_seconds").total, _series(lines, "data/wait_share").highest
    facts = {
        "loader": f"{data.get('loader')}, {data.get('workers')} workers per process",
        "images from": data.get("path") or f"{data.get('procedural_images')} procedural images",
        "batch": f"{data.get('batch_per_rank')} per process",
        "waited": f"{waited:.2f} s of {seconds:.2f} s, "
        f"{1000 * waited / max(steps, 1):.1f} ms per step on the slowest process",
    }
    if worst is not None:
        facts["worst stretch"] = f"{percent(worst[1])} of the time, before step {worst[0]:,}"
    if (replaced := number(last.get("data/replaced"))) is not None:
        facts["unreadable images replaced"] = f"{replaced:.0f}"
    return _table(facts.items(), None)


def _profile(folder: Path, problems: list[str]) -> str:
    """Parts of a step and the most expensive operations or kernels, if some steps were recorded."""
    found, rows = _read(folder / PROFILE_FILE, problems), []
    try:
        with (folder / KERNELS_FILE).open(encoding="utf-8", newline="") as file:
            rows = list(islice(csv.DictReader(file), MOST_SHOWN))
    except (OSError, ValueError, csv.Error) as error:
        if found:
            problems.append(f"{KERNELS_FILE} cannot be read: {error}")
    steps, seconds, first = (number(found.get(name)) or 0.0 for name in ("steps", "seconds", "first_step"))
    if not (steps and seconds):
        return ""
    parts = ((str(name), number(value) or 0.0) for name, value in _part(found, "parts").items())
    cells = [(name, f"{1000 * value / steps:.2f}", percent(value / seconds)) for name, value in parts]
    kind, names = str(found.get("kind")), ("name", "calls", "total_ms", "self_ms")
    most = [(*(str(row.get(name)) for name in names), _percent(row.get("share"))) for row in rows]
    note = f"Steps {first:,.0f} to {first + steps - 1:,.0f}, {1000 * seconds / steps:.2f} ms each, on {found.get('device')}"
    return (
        f"<p>{escape(note)}. {escape(str(found.get('note') or ''))}</p>"
        + _columns(("part of a step", "ms per step", "share"), cells)
        + _columns((f"{kind}, the most expensive", "calls", "total ms", "self ms", "share of the steps"), most)
        + f'<p>All of them: <a href="{PROFILE_FOLDER}/{KERNELS_FILE}">{KERNELS_FILE}</a>; over time, for Perfetto '
        f'or chrome://tracing: <a href="{PROFILE_FOLDER}/{TRACE_FILE}">{TRACE_FILE}</a>.</p>'
    )


def _percent(text: str | None) -> str:
    """A share from a file."""
    try:
        return percent(float(text or ""))
    except ValueError:
        return "?"


def _columns(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head; all columns but the first are numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>'


def _evaluations(folder: Path) -> str:
    """The results of `python -m patchlight.evaluation`: numbers with the nearest published ones, and pictures."""
    rows, figures = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            rows.append(_evaluation(read_json(file)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            rows.append((file.name, f"cannot be read: {type(error).__name__}: {error}"))
    for pictures in sorted(path for path in folder.glob("*") if path.is_dir()):
        figures.append(_pictures(pictures, ""))
    return _table(rows, None) + "".join(figures)


def _evaluation(result: dict) -> tuple[str, str]:
    numbers = ", ".join(f"{name} {percent(value)}" for name, value in result["metrics"].items())
    notes = [f"{name}: {used} where the protocol has {frozen}" for name, (frozen, used) in result["changed"].items()]
    notes += result["notes"] + [f"failed: {part}: {reason}" for part, reason in result["failed"].items()]
    known = [
        f"{row['method']} {row['backbone']}: "
        + ", ".join(f"{name} {value:g}%" for name, value in row["metrics"].items())
        for row in result["published"]
    ]
    parts = [numbers, *(["published: " + "; ".join(known)] if known else []), *notes]
    return f"{result['task']} on {result['data']}", " · ".join(parts)


def _pictures(folder: Path, kind: str) -> str:
    """PNG files whose names start with the kind, the last ones and some before, inside the page."""
    files = sorted(folder.glob(f"{kind}*.png"))
    if len(files) > _MOST_PICTURES:
        files = [files[round(i * (len(files) - 1) / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
    figures = "".join(_figure(file, kind) for file in files)
    return f'<div class="figures">{figures}</div>' if figures else ""


def _figure(file: Path, kind: str) -> str:
    """A picture inside the page; only its name if it is very large or cannot be read."""
    step = file.stem.removeprefix(kind).strip("-_")
    caption = f"{kind}, step {int(step):,}" if step.isdecimal() else file.stem.replace("-", " ").replace("_", " ")
    try:
        large = file.stat().st_size > _MOST_PICTURE_BYTES
        data = "" if large else base64.b64encode(file.read_bytes()).decode("ascii")
        why = f"too large for this page: {file.name}" if large else ""
    except OSError as error:
        data, why = "", f"cannot be read: {error.strerror}"
    image = f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">' if data else ""
    text = f"{caption} ({why})" if why else caption
    return f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>"


def _metric_card(
    lines: LogSummary, name: str, title: str, write: Callable[[float], str] | None = None, from_zero: bool = False
) -> str:
    series = _series(lines, name)
    chart = line_chart({name: series}, number(lines.last.get("total")), write, from_zero=from_zero)
    return _card(title, chart, series, write)


def _card(title: str, content: str, series: Series | None = None, write: Callable[[float], str] | None = None) -> str:
    last = f"<b>{(write or short)(series.last[1])}</b>" if series and series.last else ""
    return f'<div class="card"><h3>{escape(title)}{last}</h3>{content}</div>'


def _grid(cards: Iterable[str]) -> str:
    joined = "".join(cards)
    return f'<div class="charts">{joined}</div>' if joined else ""


def _series(lines: LogSummary, name: str) -> Series:
    """A number over the steps at which it is known."""
    return lines.series.get(name) or Series()


def _table(rows: Iterable[tuple[str, object]], origin: str | None) -> str:
    body = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    if not body:
        return ""
    table = f"<table>{body}</table>"
    return f"<details><summary>{escape(origin)}</summary>{table}</details>" if origin else table


def _flat(values: object, prefix: str = "") -> list[tuple[str, object]]:
    """Nested dictionaries and lists of them as rows "a.b": value."""
    items: Iterable[tuple[object, object]]
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        items = enumerate(values)
    else:
        return [(prefix, ", ".join(map(str, values)) if isinstance(values, list) else values)]
    return [row for name, value in items for row in _flat(value, f"{prefix}.{name}" if prefix else str(name))]


def _number(value: object) -> str:
    known = number(value)
    return "not finite" if known is None else short(known)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds < 1e9 else f"{short(seconds)} s"
