"""What docs/methods and docs/ops.md say is in the code: options, recipes, files, terms, signatures, measured numbers."""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import re

import pytest
from parity import ROOT

import patchlight_kernels
from patchlight import run as run_module
from patchlight.evaluation.paper_numbers import all_paper_numbers
from patchlight.objectives import OBJECTIVES
from patchlight.recipes import RECIPES
from patchlight.records import NeighborRule

PAGES = sorted((ROOT / "docs/methods").glob("*.md"))
OPS = (ROOT / "docs/ops.md").read_text()
INDEX = (ROOT / "docs/methods/index.md").read_text()
RESULTS = ROOT / "bench/results"
name_of = lambda path: path.stem


def section(text: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.+?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without heads."""
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = {number - 1 for number, cells in enumerate(lines) if set(cells[0]) == {"-"}}
    return [cells for number, cells in enumerate(lines) if number not in heads and set(cells[0]) != {"-"}]


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_options_exist(path):
    parts = {
        field.name.capitalize(): getattr(run_module, field.name.capitalize())
        for field in dataclasses.fields(run_module.Run)
    }
    known = set().union(*map(fields, OBJECTIVES.values()), {"neighbors." + name for name in fields(NeighborRule)})
    known |= {f"{name}.{field}" for name, part in parts.items() for field in fields(part)}
    known |= fields(run_module.Optim)  # named after another one of the same part
    text = path.read_text()
    if path.stem != "index":
        for cells in rows(section(text, "Options")):
            for word in re.findall(r"`([\w.]+)`", cells[0]):
                assert word in known or "neighbors" + word in known, f"{path.stem}: {word}"
    for part, field in re.findall(r"`(Optim|Model|Objectives|Data|Parallel|Output)\.(\w+)", text):
        assert field in fields(parts[part]), f"{path.stem}: {part}.{field}"
    for options in re.findall(r"`(\w+Options)", text):
        assert options in OBJECTIVES, f"{path.stem}: {options}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_recipes_files_and_terms_exist(path):
    text = path.read_text()
    commands = re.findall(r"(?:train\.py|slurm\.sbatch|patchlight train) ([a-z]\w+)", text)
    named = commands + re.findall(r"`(\w+_(?:in1k|coco|ins300)\w*)`", text)
    assert set(named) <= set(RECIPES), set(named) - set(RECIPES)
    for start in re.findall(r"`(\w+_)\*`", text):
        golden = list((ROOT / "tests/golden").glob(f"{start}*.safetensors"))
        assert golden or any(name.startswith(start) for name in RECIPES), f"{path.stem}: {start}"
    for file in re.findall(r"`((?:[\w]+/)+[\w]+\.py)`", text):
        assert (ROOT / file).is_file() or (ROOT / "ssl/patchlight" / file).is_file(), f"{path.stem}: {file}"
    code = "".join(file.read_text() for file in (ROOT / "ssl/patchlight/objectives").glob("*.py"))
    terms = re.findall(r"`([a-z_\d]+/[a-z]+)`", text.replace("`tests/golden`", ""))
    assert all(f'"{term}"' in code for term in terms), terms
    if path.stem != "index":
        assert terms, f"{path.stem} names no term"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_names_of_the_code_exist(path):
    """The second column of a table of symbols: classes, functions and attributes, by the last part of their names."""
    if path.stem == "index":
        return
    text = path.read_text()
    code = "".join(file.read_text() for file in (ROOT / "ssl/patchlight").rglob("*.py"))
    table = [cells for cells in rows(section(text, "Equations")) if len(cells) == 2]
    assert len(table) > 3
    for _, cell in table:
        for name in re.findall(r"`([\w.]+)", cell):
            last = name.split(".")[-1] if not name.endswith(".py") else "import"
            assert re.search(rf"\b{re.escape(last)}\b", code) or last.endswith("_"), f"{path.stem}: {name}"


def test_measured_steps_are_those_of_the_csv():
    measured = {}
    for row in csv.DictReader((RESULTS / "step_cpu.csv").open()):
        name = row["case"].split()[0].replace("+", " + ")
        cells = measured.setdefault(name, {"commit": row["commit"]})
        if row["provider"] == "patchlight":
            cells["time"] = f"{float(row['median_ms']):.0f} ms"
        if row["provider"] == "over host":
            cells["over"] = f"{float(row['time_ratio']):.2f}x : {float(row['flop_ratio']):.2f}x"
    cost = section(INDEX, "Extra cost")
    table = {cells[0]: cells for cells in rows(cost) if len(cells) == 3}
    assert {name: (c["time"], c.get("over", "")) for name, c in measured.items()} == {
        name: (cells[1], cells[2]) for name, cells in table.items()
    }
    assert f"commit {measured['DINO']['commit']}," in cost


def test_extra_cost_side_by_side_is_that_of_the_csv():
    over = {
        row["case"].split()[0]: row for row in csv.DictReader((RESULTS / "step_cpu.csv").open()) if row["time_ratio"]
    }
    cells = {cells[0]: cells[-1] for cells in rows(section(INDEX, "Side by side")) if len(cells) == 6}
    for method, steps in {
        "SelfPatch": ["DINO+SelfPatch"],
        "PQCL": ["iBOT+PQCL"],
        "SERE": ["iBOT+SERE", "DINO+SERE"],
    }.items():
        time, flops = (
            sorted({f"{float(over[step][key]):.2f}x" for step in steps}) for key in ("time_ratio", "flop_ratio")
        )
        assert cells[method] == f"{' to '.join(time)} time, {' to '.join(flops)} FLOPs"


def test_what_the_papers_say_about_cost_stands_beside_the_csvs():
    measured, counted = {}, {}
    for row in csv.DictReader((RESULTS / "step_cpu.csv").open()):
        measured.setdefault(row["case"].split()[0], {})[row["provider"]] = row
    for row in csv.DictReader((RESULTS / "cost.csv").open()):
        if (row["depth"], row["phase"]) == ("12", "step"):
            counted[row["method"]] = [float(row[key]) for key in ("gb", "gflop products in 16 bit")]
    time = lambda name: float(measured[name]["over host"]["time_ratio"])
    over = lambda name, host: [a / b for a, b in zip(counted[name], counted[host], strict=True)]
    more = lambda ratio: f"{100 * (ratio - 1):.0f} % more"
    shorter = lambda long, short, ratios: [f"{long / short / ratio:.2f}x" for ratio in ratios]
    (selfpatch, total, sere, pqcl) = rows(section(INDEX, "What the papers say about cost"))
    gb, flops = over("selfpatch", "dino")
    assert selfpatch[1:] == [f"{more(time('DINO+SelfPatch'))} time", f"{more(gb)} bytes, {more(flops)} FLOPs"]
    cpu, by_bytes, by_flops = shorter(300, 200, [time("DINO+SelfPatch"), gb, flops])
    assert total[1:] == [cpu, f"{by_bytes} by bytes, {by_flops} by FLOPs"]
    cpu, by_bytes, by_flops = shorter(300, 100, [time("iBOT+SERE"), *over("sere", "ibot")])
    assert sere[1:] == [f"{cpu} less time", f"{by_bytes} by bytes, {by_flops} by FLOPs"]
    memory = lambda name, provider: float(measured[name][provider]["peak_extra_mb"])
    mine, host = memory("iBOT+PQCL", "patchlight"), memory("iBOT+PQCL", "host alone")
    less = f"{100 * (1 - mine / memory('iBOT', 'patchlight')):.0f} % less memory than iBOT with four"
    words = f"{more(time('iBOT+PQCL'))} time and {more(mine / host)} memory than its host without local crops; {less}"
    assert pqcl[1] == words


def test_counted_steps_are_those_of_the_csv():
    names = {"DINO": "dino", "DINO + SelfPatch": "selfpatch", "DINO + SERE": "dino-sere", "iBOT": "ibot"}
    names |= {"iBOT + SERE": "sere", "iBOT + PQCL, no local crops": "pqcl"}
    counted = list(csv.DictReader((RESULTS / "cost.csv").open()))
    table = {cells[0]: cells[1:] for cells in rows(section(INDEX, "Extra cost")) if len(cells) == 4}
    assert set(table) == set(names)
    for name, method in names.items():
        (step,) = [row for row in counted if (row["method"], row["depth"], row["phase"]) == (method, "12", "step")]
        totals = [float(step[key]) for key in ("launches", "gb", "gflop products in 16 bit")]
        shown = [float(cell.replace(" ", "")) for cell in table[name]]
        assert all(abs(a - b) <= 0.51 for a, b in zip(totals, shown, strict=True)), f"{name}: {totals}, {shown}"


def test_the_papers_numbers_are_those_that_evaluations_show():
    known = {value for row in all_paper_numbers() for value in row.metrics.values()}
    shown = [float(number) for number in re.findall(r"\d+\.\d", section(INDEX, "The papers' numbers"))]
    assert len(shown) > 10
    assert set(shown) <= known, set(shown) - known


def test_signatures_of_operations():
    """Names and defaults of all arguments, as the page writes them."""
    shown = {}
    for block in re.findall(r"```python\n(.+?)```", OPS, re.DOTALL):
        for node in ast.parse(block).body:
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Call)
                and getattr(node.value.func, "id", "") != "print"
            ):
                call = node.value
                given = [arg.id for arg in call.args] + [f"{k.arg}={ast.unparse(k.value)}" for k in call.keywords]
                shown[call.func.id] = given
    ops = [
        name
        for name in patchlight_kernels.__all__
        if name in {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    ]
    assert set(shown) == set(ops)
    for name in ops:
        parameters = inspect.signature(getattr(patchlight_kernels, name)).parameters.values()
        wanted = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert shown[name] == wanted
