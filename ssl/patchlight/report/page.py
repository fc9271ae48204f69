"""The report of a run: one HTML file without outside resources, made from the files in the run's folder only."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

from .charts import Series, legend, line_chart, percent, short
from .run_folder import (
    DIAGNOSES_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FOLDER,
    KNN_FILE,
    METRICS_FILE,
    PICTURES_FOLDER,
    REPORT_FILE,
    RUN_FILE,
    read_json,
    read_lines,
    write_whole,
)
from .style import SCRIPT, STYLE

_NOT_LOSSES = ("data", "memory", "speed", "step", "gradient", "teacher")
_MOST_PICTURES = 4  # of one kind, spread over the run


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run's folder, from the files there, and returns its path."""
    path = Path(folder) / REPORT_FILE
    write_whole(path, build_report(Path(folder)))
    return path


def build_report(folder: Path) -> str:
    """The page as text."""
    run, environment = read_json(folder / RUN_FILE), read_json(folder / ENVIRONMENT_FILE)
    lines, knn = read_lines(folder / METRICS_FILE), read_lines(folder / KNN_FILE)
    sections = [
        _head(folder, run, lines),
        _tiles(lines, knn),
        _diagnoses(read_lines(folder / DIAGNOSES_FILE)),
        _section(
            "k-NN accuracy and attention", _knn_chart(knn, lines) + _pictures(folder / PICTURES_FOLDER, "attention")
        ),
        _section("Evaluations", _evaluations(folder / EVALUATION_FOLDER)),
        _section("Losses", _loss_charts(lines)),
        _section("Schedules and gradients", _other_charts(lines)),
        _section("Speed and data", _data_facts(run, lines) + _speed_charts(lines)),
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


def _head(folder: Path, run: dict, lines: list[dict]) -> str:
    """Name, method, and how far the run is."""
    model, last = run.get("model", {}), lines[-1] if lines else {}
    methods = " + ".join(o["kind"].removesuffix("Options") for o in run.get("objectives", {}).get("options", []))
    sizes = model.get("sizes") or {}
    network = f"{model['arch']}/{model['patch_size']}" if model else ""
    network += f" ({', '.join(f'{name} {value}' for name, value in sizes.items())})" if sizes else ""
    parts = [part for part in (methods, network, run.get("data", {}).get("path")) if part]
    step, total = last.get("step", 0), last.get("total", 0)
    state = "no log line yet"
    if total:
        state = "finished" if step >= total else "as of the last log line"
        state = f"step {step:,} of {total:,} · epoch {last['epoch']:.1f} · {last['images']:,} images · {state}"
    done = percent(step / total) if total else "0%"
    return (
        f"<header><h1>{escape(folder.name)}</h1><p>{escape(' · '.join(parts))}</p>"
        f'<div class="bar"><i style="width:{done}"></i></div><p class="state">{escape(state)}</p></header>'
    )


def _tiles(lines: list[dict], knn: list[dict]) -> str:
    """The most important numbers."""
    if not lines:
        return ""
    last = lines[-1]
    tiles = []
    if knn:
        best_k = max(_knn_names(knn), key=lambda name: knn[-1].get(name) or 0)
        gain = f"from {percent(knn[0][best_k])} at step {knn[0]['step']:,}" if len(knn) > 1 else ""
        tiles.append((f"k-NN accuracy, k={best_k[1:]}", percent(knn[-1][best_k]), gain))
    tiles.append(("loss", _number(last.get("loss")), f"from {_number(lines[0].get('loss'))}"))
    rates = _values(lines, "speed/images_per_second")
    if rates.values:
        tiles.append(("images per second", short(_median(rates.values)), "median"))
    seconds = last["seconds"]
    waited = sum(line.get("data/wait_seconds") or 0 for line in lines)
    tiles.append(("waiting for data", percent(waited / seconds if seconds else 0), f"{waited:.1f} s in all"))
    mfu = _values(lines, "speed/mfu")
    if mfu.values:
        tiles.append(("MFU", percent(_median(mfu.values)), "median; backbone only"))
    tiles.append(("peak memory", f"{last['memory/gib']:.2f} GiB", "per process"))
    tiles.append(("time", str(timedelta(seconds=round(seconds))), f"{last['images']:,} images"))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><em>{escape(note)}</em></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _diagnoses(diagnoses: list[dict]) -> str:
    if not diagnoses:
        return ""
    items = "".join(
        f"<li><b>{escape(d['name'])}</b> at step {d['step']:,}: {escape(d['sentence'])}</li>" for d in diagnoses[-20:]
    )
    more = f"<p>{len(diagnoses) - 20} earlier ones are in {DIAGNOSES_FILE}.</p>" if len(diagnoses) > 20 else ""
    return f'<section class="alarm"><h2>Diagnoses</h2><ul>{items}</ul>{more}</section>'


def _knn_chart(knn: list[dict], lines: list[dict]) -> str:
    if not knn:
        return ""
    series = [_values(knn, name, f"k = {name[1:]}") for name in _knn_names(knn)]
    total = lines[-1]["total"] if lines else None
    chart = line_chart(series, total, percent, from_zero=True, dots=True)
    return f'<div class="charts">{_card("k-NN accuracy of the teacher", legend(series) + chart)}</div>'


def _knn_names(knn: list[dict]) -> list[str]:
    return [name for name in knn[-1] if name[0] == "k" and name[1:].isdigit()]


def _loss_charts(lines: list[dict]) -> str:
    """The weighted sum, each term, and each term over ln K."""
    if not lines:
        return ""
    names = [n for n in lines[-1] if "/" in n and n.split("/")[0] not in _NOT_LOSSES and not n.endswith("/nonfinite")]
    ratios = [name for name in names if name.endswith("/ln_k")]
    cards = [_metric_card(lines, "loss", "loss (weighted sum)")]
    cards += [_metric_card(lines, name, name) for name in names if name not in ratios]
    if ratios:
        series = [_values(lines, name, name.removesuffix("/ln_k")) for name in ratios]
        chart = line_chart(series, lines[-1]["total"], reference=(1.0, "1: uniform, nothing learned"))
        cards.append(_card("loss / ln K", legend(series) + chart))
    return _grid(cards)


def _other_charts(lines: list[dict]) -> str:
    names = {
        "lr": "learning rate",
        "momentum": "teacher momentum",
        "weight_decay": "weight decay",
        "gradient/norm": "gradient norm",
        "teacher/spread": "spread of the teacher's summaries",
        "step/refused": "share of refused steps",
    }
    return _grid(_metric_card(lines, name, title) for name, title in names.items() if lines and name in lines[-1])


def _speed_charts(lines: list[dict]) -> str:
    charts: dict[str, tuple[str, Callable[[float], str] | None]] = {
        "speed/images_per_second": ("images per second, all processes", None),
        "data/wait_share": ("time spent waiting for data", percent),
        "speed/mfu": ("MFU, backbone only", percent),
        "memory/gib": ("peak memory per process, GiB", None),
    }
    return _grid(
        _metric_card(lines, name, title, write, from_zero=True)
        for name, (title, write) in charts.items()
        if any(name in line for line in lines)
    )


def _data_facts(run: dict, lines: list[dict]) -> str:
    """Which loader ran and how long steps waited for it."""
    data = run.get("data", {})
    if not data or not lines:
        return ""
    steps, seconds = sum(line["steps"] for line in lines), lines[-1]["seconds"]
    waited = sum(line.get("data/wait_seconds") or 0 for line in lines)
    worst = max(lines, key=lambda line: line.get("data/wait_share") or 0)
    facts = {
        "loader": f"{data['loader']}, {data['workers']} workers per process",
        "images from": data["path"] or f"{data['procedural_images']:,} procedural images",
        "batch": f"{data['batch_per_rank']} per process",
        "waited": f"{waited:.2f} s of {seconds:.2f} s, {1000 * waited / steps:.1f} ms per step on the slowest process",
        "worst stretch": f"{percent(worst.get('data/wait_share') or 0)} of the time, before step {worst['step']:,}",
    }
    if "data/replaced" in lines[-1]:
        facts["unreadable images replaced"] = f"{lines[-1]['data/replaced']:.0f}"
    return _table(facts.items(), None)


def _evaluations(folder: Path) -> str:
    """The results of `python -m patchlight.evaluation`: numbers with the nearest published ones, and pictures."""
    rows, figures = [], []
    for file in sorted(folder.glob("*.json")):
        result = read_json(file)
        numbers = ", ".join(f"{name} {percent(value)}" for name, value in result["metrics"].items())
        notes = [
            f"{name}: {used} where the protocol has {frozen}" for name, (frozen, used) in result["changed"].items()
        ]
        notes += result["notes"] + [f"failed: {part}: {reason}" for part, reason in result["failed"].items()]
        known = [
            f"{row['method']} {row['backbone']}: "
            + ", ".join(f"{name} {value:g}%" for name, value in row["metrics"].items())
            for row in result["published"]
        ]
        parts = [numbers, *(["published: " + "; ".join(known)] if known else []), *notes]
        rows.append((f"{result['task']} on {result['data']}", " · ".join(parts)))
    for pictures in sorted(path for path in folder.glob("*") if path.is_dir()):
        figures.append(_pictures(pictures, ""))
    return _table(rows, None) + "".join(figures)


def _pictures(folder: Path, kind: str) -> str:
    """PNG files whose names start with the kind, the last ones and some before, inside the page."""
    files = sorted(folder.glob(f"{kind}*.png"))
    if len(files) > _MOST_PICTURES:
        files = [files[round(i * (len(files) - 1) / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
    figures = []
    for file in files:
        number = file.stem.removeprefix(kind).strip("-_")
        caption = f"{kind}, step {int(number):,}" if number.isdigit() else file.stem.replace("-", " ").replace("_", " ")
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        figures.append(
            f'<figure><img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _metric_card(
    lines: list[dict], name: str, title: str, write: Callable | None = None, from_zero: bool = False
) -> str:
    series = _values(lines, name)
    return _card(title, line_chart([series], lines[-1]["total"], write, from_zero=from_zero), series, write)


def _card(title: str, content: str, series: Series | None = None, write: Callable | None = None) -> str:
    last = f"<b>{(write or short)(series.values[-1])}</b>" if series and series.values else ""
    return f'<div class="card"><h3>{escape(title)}{last}</h3>{content}</div>'


def _grid(cards: Iterable[str]) -> str:
    joined = "".join(cards)
    return f'<div class="charts">{joined}</div>' if joined else ""


def _values(lines: list[dict], name: str, title: str | None = None) -> Series:
    """A number over the steps at which it is known."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return Series(title or name, [step for step, _ in known], [value for _, value in known])


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


def _number(value: float | None) -> str:
    return "not finite" if value is None else short(value)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
