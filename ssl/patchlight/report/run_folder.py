"""The files of a run's folder that people and the report read: their names, and JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

RUN_FILE, ENVIRONMENT_FILE = "run.json", "environment.json"
METRICS_FILE, KNN_FILE, DIAGNOSES_FILE = "metrics.jsonl", "knn.jsonl", "diagnoses.jsonl"  # a line per event
EPOCHS_FILE = "log.txt"  # a line per epoch, as DINO writes it
REPORT_FILE, PICTURES_FOLDER, EVALUATION_FOLDER = "report.html", "plots", "evaluation"


def append_line(path: Path, record: Mapping) -> None:
    """Adds one JSON object as a line; numbers that JSON does not have become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; none if there is no file. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind(path: Path, keep: Callable[[dict], bool]) -> list[dict]:
    """Removes the lines for which `keep` is false, and returns the others."""
    kept = [line for line in read_lines(path) if keep(line)]
    if path.exists():
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_json(path: Path) -> dict:
    """The object in a file, empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: a reader gets the whole old text or the whole new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
