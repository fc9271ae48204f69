"""The files of a run's folder that people and the report read: their names, and how whole files are written and read."""

from __future__ import annotations

import json
from pathlib import Path

RUN_FILE, ENVIRONMENT_FILE = "run.json", "environment.json"
METRICS_FILE, KNN_FILE, DIAGNOSES_FILE = "metrics.jsonl", "knn.jsonl", "diagnoses.jsonl"  # a line per event
EPOCHS_FILE = "log.txt"  # a line per epoch, as DINO writes it
WANDB_ID_FILE = "wandb/run_id.txt"  # which a resumed run continues
BEST_FILE = "best.json"  # the best checkpoint by a number of the looks
REPORT_FILE, PICTURES_FOLDER, EVALUATION_FOLDER = "report.html", "plots", "evaluation"
PROFILE_FOLDER, TRACE_FILE, KERNELS_FILE, PROFILE_FILE = "profile", "trace.json.gz", "kernels.csv", "profile.json"


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
