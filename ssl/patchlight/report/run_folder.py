"""The files of a run's folder that people and the report read: their names, and how whole files are written and read."""

from __future__ import annotations

import json
import os
from pathlib import Path

RUN_FILE, ENVIRONMENT_FILE = "run.json", "environment.json"
METRICS_FILE, KNN_FILE, DIAGNOSES_FILE = "metrics.jsonl", "knn.jsonl", "diagnoses.jsonl"  # a line per event
EPOCHS_FILE = "log.txt"  # a line per epoch, as DINO writes it
REPORT_FILE, PICTURES_FOLDER, EVALUATION_FOLDER = "report.html", "plots", "evaluation"


def read_json(path: Path) -> dict:
    """The object in a file, empty if there is no file; a ValueError if it holds anything else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold an object")
    return found


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file at once: a reader gets the whole old content or the whole new content, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
