"""The tables of a model card about how the model was trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ..values import shown
from .files import last_part
from .markdown import escaped, table
from .papers import methods_of, papers_of
from .run_facts import RunFacts

CROPS = {"global_crops": "global crops", "local_crops": "local crops", "query_crops": "query crops"}


def training_rows(facts: RunFacts) -> list[tuple[str, str]]:
    """What was done: only what the run has recorded."""
    clock, environment = facts.clock, facts.environment
    rows = [
        ("data", escaped(_data(facts.run["data"]))),
        ("steps", f"{clock['step']:,} of {clock['total']:,}"),
        ("images seen", f"{clock['images_seen']:,}"),
        ("images per step", f"{global_batch(facts.run, facts.facts['processes']):,}"),
    ]
    if facts.time is not None:
        seconds, step = facts.time
        until = "" if step == clock["step"] else f" (to step {step:,})"
        rows.append(("time", f"{timedelta(seconds=round(seconds))}{until}"))
    if hardware := _hardware(environment):
        rows.append(("hardware", escaped(hardware)))
    if packages := environment.get("packages"):
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        rows.append(("software", escaped(f"Python {environment.get('python', '?')}, {versions}")))
    if commit := environment.get("commit"):
        rows.append(("commit of patchlight", escaped(commit)))
    return rows


def global_batch(run: Mapping[str, Any], processes: int) -> int:
    return run["data"]["batch_per_rank"] * processes * run["parallel"]["accumulate"]


def _data(data: Mapping[str, Any]) -> str:
    if data["loader"] == "procedural":
        return f"{data['procedural_images']:,} images that patchlight draws (procedural), no photographs"
    return last_part(data["path"])


def _hardware(environment: Mapping[str, Any]) -> str:
    gpus = Counter(gpu["name"] for gpu in environment.get("gpus", ()))
    found = ", ".join(f"{count} x {name}" for name, count in gpus.items())
    if not found and environment.get("cpu"):
        found = f"{environment['cpu']}, {environment.get('cpu_cores', '?')} cores"
    processes = environment.get("processes", 1)
    return f"{found}; {processes} processes" if found and processes != 1 else found


def objectives_table(run: Mapping[str, Any]) -> str:
    """The methods, with every option of their objectives."""
    rows = []
    for name, options in zip(methods_of(run), run["objectives"]["options"], strict=True):
        papers = papers_of({"objectives": {"options": [options]}})
        paper = f"{escaped(papers[0].title)} ({papers[0].year})" if papers else ""
        settings = ", ".join(f"{key} {shown(value)}" for key, value in options.items() if key != "kind")
        rows.append((escaped(name), paper, escaped(settings)))
    return table(("objective", "paper", "options"), rows)


def recipe_table(run: Mapping[str, Any], processes: int) -> str:
    """The settings that people ask for first."""
    model, optim, parallel, crops = run["model"], run["optim"], run["parallel"], run["data"]["crops"]
    batch = global_batch(run, processes)
    rows = [(CROPS[kind], "; ".join(map(_crop, crops[kind]))) for kind in CROPS if crops.get(kind)]
    rows += [
        ("epochs", str(run["schedule"]["epochs"])),
        ("batch", f"{run['data']['batch_per_rank']} x {processes} processes x {parallel['accumulate']} accumulated"),
        ("optimizer", f"{optim['name']}, betas {shown(optim['betas'])}"),
        (
            "learning rate",
            f"{optim['base_lr']:g} per 256 images: {optim['base_lr'] * batch / 256:g}, to {optim['min_lr']:g}",
        ),
        ("warm-up", f"{optim['warmup_epochs']:g} epochs"),
        ("weight decay", f"{optim['weight_decay']:g}, to {optim['weight_decay_end']:g}"),
        ("gradient clipping", f"{optim['clip']:g}, {optim['clip_mode']}" if optim["clip"] else "none"),
        ("teacher momentum", f"{optim['teacher_momentum']:g}, to {optim['teacher_momentum_end']:g}"),
        ("drop path", f"{model['drop_path']:g}, in the student alone"),
        ("positions", str(model["positions"])),
        ("precision", str(parallel["precision"])),
        ("seed", str(parallel["seed"])),
    ]
    if model["init_from"]:
        rows.append(("started from", last_part(model["init_from"])))
    return table(("setting", "value"), [(name, escaped(value)) for name, value in rows])


def _crop(spec: Mapping[str, Any]) -> str:
    low, high = spec["scale"]
    return f"{spec['count']} of {spec['size']} x {spec['size']} pixels, {low:g} to {high:g} of the area"
