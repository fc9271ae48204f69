"""The controlled study: its cells differ only in their objectives; its table and plot are made from the CSV."""

import csv
from dataclasses import replace

import pytest
from bench import study
from bench.rows import append_row

from patchlight.engine.assembly import build_objectives


def test_cells_differ_only_in_what_is_studied():
    runs = {
        name: study._cell(method(study.cpu().run), 10, None, study.Path("x")) for name, method in study.METHODS.items()
    }
    host = runs["host"].to_dict()
    for name, run in runs.items():
        assert build_objectives(run).objectives(), name
        differing = {part for part, value in run.to_dict().items() if value != host[part]}
        assert differing <= {"objectives", "output", "model", "data"}, name
        assert replace(run.model, summary="cls") == runs["host"].model
        assert replace(run.data.crops, query_crops=()) == runs["host"].data.crops
        assert run.objectives.options[0] == runs["host"].objectives.options[0], "all with the same host"
    assert runs["host + PQCL"].data.crops.query_crops[0].size % 8 == 0
    assert len({run.output.folder for run in runs.values()}) == len(runs)
    assert study.gpu().run.model.image_size == 96


def row(method: str, seed: int, steps: int, k20: float, settings: str = "now") -> dict:
    scores = dict.fromkeys(study.MEASURES, 0.5) | {"k20": k20}
    facts = {"hardware": "H", "threads": 1, "torch": "t", "triton": "t", "commit": "c", "date": "d"}
    cell = {"size": "cpu", "method": method, "seed": seed, "steps": steps, "settings": settings}
    return cell | scores | facts


def test_the_table_has_the_latest_complete_cells(tmp_path, capsys):
    path = tmp_path / "cpu.csv"
    for cell in (
        row("host", 10, 256, 0.9, "before"),
        row("host", 10, 256, 0.2),
        row("host", 11, 256, 0.4),
        row("host + SERE", 10, 3, 0.99),
        row("host + SERE", 10, 256, 0.5),
    ):
        append_row(cell, path, study.COLUMNS)
    assert study._done(path, "cpu", "host", 10, "now")
    assert not study._done(path, "cpu", "host", 12, "now")
    assert not study._done(path, "cpu", "host", 10, "later")
    study.draw(path)
    text = path.with_suffix(".md").read_text()
    assert "| host | 2 | 50.0 ± 0.0 | 30.0 ± 14.1 |" in text
    assert "| host + SERE | 1 | 50.0 (one seed) | 50.0 (one seed) |" in text
    assert "| +30.0 (one seed) | +0.0 (one seed) |" in text, "against the host of the same seed"
    assert "256 steps" in text
    assert path.with_suffix(".png").stat().st_size > 5000
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == 5
    with pytest.raises(SystemExit, match="nothing to draw"):
        study.draw(tmp_path / "none.csv")
    with pytest.raises(SystemExit, match="seeds other than 0 and 1"):
        study.measure_study(seeds=(1,))
