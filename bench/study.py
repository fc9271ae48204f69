"""Does the method work? The host alone against host + SelfPatch, + SERE, + PQCL: same images, steps, crops and seeds.

Only the objectives differ, and what an objective needs: SelfPatch summarizes an image by class attention, so the host has a
second control with that summary; PQCL needs a query crop. k-NN accuracy on new images and J&F on videos are measured by the
code of `python -m patchlight.evaluation`, on data that no cell has trained on.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from patchlight.data.policy import CropSpec
from patchlight.data.procedural_video import write_davis
from patchlight.engine.assembly import train
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.evaluation.davis.benchmark import DavisProtocol, evaluate_davis
from patchlight.evaluation.davis.folder import DavisFolder
from patchlight.evaluation.features import Reading
from patchlight.evaluation.probes.knn import KnnProtocol, evaluate_knn
from patchlight.evaluation.probes.labeled import open_labeled
from patchlight.evaluation.ranks import Ranks
from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.interface import ObjectiveOptions
from patchlight.objectives.pqcl import PqclOptions
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.objectives.sere import SereOptions, sere_weights
from patchlight.recipes.ours import demo
from patchlight.run import Objectives, Optim, Parallel, Run, Schedule

from .report import pyplot
from .rows import PROVENANCE, CsvRow, Row, append_row, provenance, read_rows

MEASURES = {"k10": "k-NN, k=10", "k20": "k-NN, k=20", "J&F": "J&F", "J_mean": "J", "F_mean": "F"}
COLUMNS = ("size", "method", "seed", "steps", *MEASURES, "settings", *PROVENANCE)
RESULTS = Path("bench/results/study")
OptionsType = TypeVar("OptionsType", bound=ObjectiveOptions)


@dataclass(frozen=True)
class StudySize:
    """How large a cell is, and what it is measured on."""

    run: Run
    videos: int
    frames: int
    video_size: int
    short_side: int


def cpu() -> StudySize:
    """The demo's model and 256 steps: one to three minutes per cell on two cores."""
    run = demo()
    return StudySize(replace(run, schedule=Schedule(epochs=8)), videos=8, frames=16, video_size=192, short_side=96)


def gpu() -> StudySize:
    """ViT-Ti/8 at 96 pixels on 20,480 images, 8,000 steps of 256."""
    run = demo()
    crops = replace(
        run.data.crops,
        global_crops=tuple(replace(spec, size=96) for spec in run.data.crops.global_crops),
        local_crops=tuple(replace(spec, size=48) for spec in run.data.crops.local_crops),
    )
    run = replace(
        run,
        model=replace(run.model, image_size=96, sizes={}, drop_path=0.1),
        data=replace(run.data, crops=crops, batch_per_rank=256, procedural_images=20_480, workers=8),
        optim=Optim(base_lr=1e-3, warmup_epochs=10, teacher_momentum=0.996, freeze_prototypes_epochs=1),
        schedule=Schedule(epochs=100),
        parallel=Parallel(precision="bf16"),
    )
    return StudySize(run, videos=30, frames=48, video_size=384, short_side=192)


SIZES: dict[str, Callable[[], StudySize]] = {"cpu": cpu, "gpu": gpu}
QUERY_SHARE = 2 / 3  # a query crop's side in local crops' sides, at least 2 patches


def _host(run: Run) -> Run:
    """DINO as in the demo, with a class token and a fixed position table, which PQCL needs and all share."""
    model = replace(run.model, summary="cls", positions="sincos")
    return replace(run, model=model, objectives=Objectives((_options(run, DinoOptions),)))


def _options(run: Run, kind: type[OptionsType]) -> OptionsType:
    return next(options for options in run.objectives.options if isinstance(options, kind))


def _with(run: Run, options: ObjectiveOptions, weights: dict[str, float]) -> Run:
    return replace(run, objectives=Objectives((*run.objectives.options, options), weights=weights))


def _host_class_attention(run: Run) -> Run:
    run = _host(run)
    return replace(run, model=replace(run.model, summary="class_attention"))


def _selfpatch(run: Run) -> Run:
    return _with(_host_class_attention(run), _options(run, SelfPatchOptions), run.objectives.weights)


def _sere(run: Run) -> Run:
    return _with(_host(run), SereOptions(), sere_weights({"dino/cls": 1.0}, 1.0, 1.0))


def _pqcl(run: Run) -> Run:
    run, crops, patch = _host(run), run.data.crops, run.model.patch_size
    local = crops.local_crops[0]
    side = max(2, round(QUERY_SHARE * local.size / patch)) * patch
    query = CropSpec(1, side, local.scale, flip=0.0, photometric=local.photometric)
    run = replace(run, data=replace(run.data, crops=replace(crops, query_crops=(query,))))
    return _with(
        run, PqclOptions(target=_options(run, DinoOptions).target, teacher_temperature=0.04, warmup_epochs=0), {}
    )


METHODS: dict[str, Callable[[Run], Run]] = {
    "host": _host,
    "host, class attention": _host_class_attention,
    "host + SelfPatch": _selfpatch,
    "host + SERE": _sere,
    "host + PQCL": _pqcl,
}
CONTROLS = {"host + SelfPatch": "host, class attention", "host + SERE": "host", "host + PQCL": "host"}
GAINS = ("k20", "J&F")
HEAD = ("method", "seeds", *MEASURES.values(), *(f"{MEASURES[name]} over control" for name in GAINS))


def measure_study(
    size: str = "cpu",
    seeds: tuple[int, ...] = (10, 11, 12),
    methods: tuple[str, ...] = tuple(METHODS),
    steps: int | None = None,
    work: Path = Path("runs/study"),
    out: Path | None = None,
    threads: int = 2,
) -> None:
    """Train and measure every cell of the study that is not measured yet, then draw its table and plot.

    Args:
        size: cpu or gpu.
        seeds: one cell each per method; 0 and 1 are those of the test images.
        methods: which methods.
        steps: fewer steps, to try the script; such cells are never mixed with others.
        work: folder of runs; an interrupted cell resumes there.
        out: the CSV to add to; by default bench/results/study/<size>.csv.
        threads: CPU threads.
    """
    if size not in SIZES or not set(methods) <= set(METHODS) or {0, 1} & set(seeds):
        raise SystemExit(
            f"study: size must be one of {tuple(SIZES)}, methods among {tuple(METHODS)} and seeds other than 0 and 1, got"
            f" {size!r}, {methods} and {seeds}; change them."
        )
    torch.set_num_threads(threads)
    chosen, out = SIZES[size](), out or RESULTS / f"{size}.csv"
    videos = work / size / f"videos-{chosen.videos}-{chosen.frames}-{chosen.video_size}"
    if not (videos / "ImageSets").exists():  # written last
        write_davis(videos, chosen.videos, chosen.frames, chosen.video_size, seed=1)
    for (
        seed
    ) in seeds:  # all methods of a seed before the next seed, so that a study that is stopped early compares fairly
        for method in methods:
            run = _cell(METHODS[method](chosen.run), seed, steps, work / size)
            settings = _settings(run, chosen)
            if _done(out, size, method, seed, settings):
                print(f"skip: {method}, seed {seed}: finished, in {out}")
                continue
            print(f"cell: {method}, seed {seed}: {run.output.folder}", flush=True)
            train(run)
            row = {"size": size, "method": method, "seed": seed, "settings": settings}
            device = "cuda" if torch.cuda.is_available() else "cpu"
            append_row(row | _measure(run, chosen, videos) | provenance(device), out, COLUMNS)
    draw(out)


def _cell(run: Run, seed: int, steps: int | None, folder: Path) -> Run:
    """The run of one cell: no evaluation on the way, a checkpoint at the end."""
    schedule = Schedule(epochs=1, steps_per_epoch=steps) if steps else run.schedule
    kinds = [type(options).__name__.removesuffix("Options").lower() for options in run.objectives.options]
    name = "-".join([*kinds, run.model.summary, f"seed{seed}", *([f"{steps}steps"] if steps else [])])
    output = replace(run.output, folder=str(folder / name), evaluate_every=0, save_every=10**6, resume=True, keep=1)
    warmup = min(run.optim.warmup_epochs, schedule.epochs)
    return replace(
        run,
        schedule=schedule,
        optim=replace(run.optim, warmup_epochs=warmup if not steps else 0),
        parallel=replace(run.parallel, seed=seed),
        output=output,
    )


def _measure(run: Run, size: StudySize, videos: Path) -> Row:
    """k-NN accuracy and J&F of the trained teacher."""
    ranks = Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = open_checkpoint(run.output.folder).to(ranks.device)
    facts = json.loads((Path(encoder.name) / "facts.json").read_text())
    knn = evaluate_knn(encoder, open_labeled("procedural"), KnnProtocol(k=(10, 20)), ranks, Reading(workers=0))
    protocol = DavisProtocol(short_side=size.short_side, std=None)
    davis = evaluate_davis(encoder, DavisFolder(videos), protocol, ranks, Path(run.output.folder) / "davis", previews=2)
    if davis.failed:
        raise SystemExit(
            f"study: every video must be scored, got failures of {davis.failed}; delete {videos} and run again."
        )
    scores = knn | davis.metrics()
    return {"steps": facts["clock"]["step"], **{name: round(scores[name], 5) for name in MEASURES}}


def _settings(run: Run, size: StudySize) -> str:
    """A digest of everything but the folder and the seed: rows with another digest belong to another study."""
    settings = run.to_dict()
    del settings["output"], settings["parallel"]["seed"]
    rest = {name: value for name, value in asdict(size).items() if name != "run"}
    return hashlib.sha256(json.dumps([settings, rest], sort_keys=True).encode()).hexdigest()[:12]


def _done(path: Path, size: str, method: str, seed: int, settings: str) -> bool:
    cell = (size, method, str(seed), settings)
    rows = read_rows(path) if path.exists() else []
    return any((row["size"], row["method"], row["seed"], row["settings"]) == cell for row in rows)


def draw(rows: Path = RESULTS / "cpu.csv") -> None:
    """Draw the study's table (.md) and plot (.png) beside its CSV.

    Args:
        rows: the CSV of `python -m bench study`.
    """
    measured = read_rows(rows) if rows.exists() else []
    if not measured:
        raise SystemExit(
            f"study: nothing to draw: rows must hold a finished cell, got none in {rows}; run the study first."
        )
    longest = max(measured, key=lambda row: int(row["steps"]))["steps"]  # trial cells stay out
    latest = {row["method"]: row["settings"] for row in measured if row["steps"] == longest}
    chosen = {
        method: [r for r in measured if (r["method"], r["steps"], r["settings"]) == (method, longest, latest[method])]
        for method in METHODS
        if method in latest
    }
    table, plot = rows.with_suffix(".md"), rows.with_suffix(".png")
    table.write_text(markdown(chosen, rows))
    print_table(chosen)
    draw_plot(chosen, plot)
    print(f"table: {table}\nplot: {plot}")


def mean_and_deviation(values: list[float], sign: str = "-") -> str:
    """In percent; the standard deviation of a single value is unknown."""
    mean = f"{100 * statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean} (one seed)"


def table_lines(cells: dict[str, list[CsvRow]]) -> Iterator[tuple[str, ...]]:
    """A line of the table per method. A gain is the mean of the differences seed by seed."""
    for method, rows in cells.items():
        values = [mean_and_deviation([float(row[name]) for row in rows]) for name in MEASURES]
        control = {row["seed"]: row for row in cells.get(CONTROLS.get(method, ""), [])}
        pairs = [(row, control[row["seed"]]) for row in rows if row["seed"] in control]
        gains = [[float(row[name]) - float(other[name]) for row, other in pairs] for name in GAINS]
        yield method, str(len(rows)), *values, *(mean_and_deviation(gain, "+") if gain else "" for gain in gains)


def markdown(cells: dict[str, list[CsvRow]], source: Path) -> str:
    first = next(iter(cells.values()))[0]
    text = [
        f"{first['hardware']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}, {first['date']}"
        f" ([`{source.name}`]({source.name})); {first['steps']} steps each; mean ± standard deviation over seeds, percent;"
        " the control of SelfPatch is the host with class attention, that of SERE and PQCL the host.",
        "",
    ]
    text += ["| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *table_lines(cells))]
    return "\n".join(text) + "\n"


def print_table(cells: dict[str, list[CsvRow]]) -> None:
    kept = [name for name in HEAD if name not in ("seeds", "J", "F", MEASURES["k10"])]  # 80 columns
    table = Table(*kept)
    for line in table_lines(cells):
        table.add_row(*(value for name, value in zip(HEAD, line, strict=True) if name in kept))
    Console().print(table)


def draw_plot(cells: dict[str, list[CsvRow]], path: Path) -> None:
    """A dot per seed, a line at each method's mean, and a line across at the host's mean."""
    plt = pyplot()
    panels = {"k20": "k-NN accuracy (k=20), %", "J&F": "J&F on procedural videos, %"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 0.6 * len(cells) + 1.6), layout="constrained", sharey=True)
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for place, (method, rows) in enumerate(cells.items()):
            values = [100 * float(row[name]) for row in rows]
            color = "#868e96" if method.startswith("host") and "+" not in method else "#d9480f"
            axis.plot(values, [place] * len(values), "o", color=color, markersize=7, alpha=0.75)
            axis.plot([statistics.mean(values)] * 2, [place - 0.28, place + 0.28], color=color, linewidth=2.5)
            if method == "host":
                axis.axvline(statistics.mean(values), color="#adb5bd", linestyle="--", linewidth=1, zorder=0)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_yticks(range(len(cells)), list(cells))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    first = next(iter(cells.values()))[0]
    figure.suptitle(
        f"{first['size']} size, {first['steps']} steps; {first['hardware']}, commit {first['commit']}, {first['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
