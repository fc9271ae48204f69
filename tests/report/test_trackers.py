"""Weights & Biases and TensorBoard get what a run has, and whatever becomes of them, the run goes on at its pace."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from engine.tiny_run import tiny_run
from PIL import Image

from patchlight.engine.assembly import train
from patchlight.records import Clock
from patchlight.report import entry as entry_module
from patchlight.report import wandb_process, wandb_tracker
from patchlight.report.entry import Entry, trackers_of
from patchlight.report.journal import Journal
from patchlight.report.wandb_tracker import WandbTracker

STAND_IN = """
import json, os, time

def note(*what):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")
    trouble = os.environ.get("TROUBLE", "").split()
    if what[0] in trouble or "all" in trouble:
        raise RuntimeError(f"no {what[0]} today")
    if f"hang-{what[0]}" in trouble:
        time.sleep(1000)

class Summary(dict):
    def __setitem__(self, key, value):
        note("summary", key, value)
        super().__setitem__(key, value)

class Run:
    url, dir, offline = "https://wandb.example/run", "/somewhere/files", False
    summary = Summary()
    def define_metric(self, *names, **options): note("define_metric", *names, options)
    def log(self, values): note("log", {k: v if isinstance(v, (int, float)) else v.size for k, v in values.items()})
    def alert(self, title, text): note("alert", title, text)
    def finish(self, exit_code): note("finish", exit_code)

def init(config, allow_val_change):
    names = ("PROJECT", "NAME", "DIR", "RUN_ID", "RESUME")
    note("init", config, {name: os.environ["WANDB_" + name] for name in names}, os.getpid())
    return Run()

class Image:
    def __init__(self, image):
        note("image")
        self.size = image.size
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts a module that records its calls in the place of wandb; returns them."""
    place = tmp_path / "stand in"
    (place / "wandb").mkdir(parents=True)
    (place / "wandb" / "__init__.py").write_text(STAND_IN)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.syspath_prepend(place)

    def read(kind: str | None = None) -> list[list]:
        lines = (tmp_path / "calls.jsonl").read_text().splitlines() if (tmp_path / "calls.jsonl").exists() else []
        return [call for call in map(json.loads, lines) if kind in (None, call[0])]

    return read


def png(width: int = 5, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (250, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of_a_run(tmp_path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"model": {"arch": "vit_small"}}')
    return folder


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_wandb_gets_numbers_pictures_looks_and_diagnoses(tmp_path, calls, capsys):
    said: list[str] = []
    tracker = WandbTracker(folder_of_a_run(tmp_path), said.append)
    tracker.put(Entry(0.0, 0, {"knn/k10": 0.5}, {"attention": png()}))
    tracker.put(Entry(0.0, 5, {"loss": 2.5}))
    tracker.put(Entry(0.0, 5, name="diverged", sentence="The weights are large."))
    tracker.put(Entry(0.0, 8, {"knn/k10": 0.25}))
    tracker.close()
    assert said == []
    (_, config, names, _), *rest = calls()
    assert config == {"model": {"arch": "vit_small"}}
    run_id = (tmp_path / "a run/wandb/run_id.txt").read_text()
    assert names == {"PROJECT": "patchlight", "NAME": "a run", "DIR": str(tmp_path / "a run"), "RUN_ID": run_id,
                     "RESUME": "allow"}  # fmt: skip
    logged = [call[1] for call in rest if call[0] == "log"]
    assert logged == [
        {"step": 0, "knn/k10": 0.5, "attention": [5, 3]},
        {"step": 5, "loss": 2.5},
        {"step": 8, "knn/k10": 0.25},
    ]
    summary = {name: value for _, name, value in calls("summary")}
    assert summary == {"knn/k10": 0.25, "knn/k10/best": 0.5, "diagnosis/diverged": "step 5: The weights are large."}
    assert calls("alert") == [["alert", "diverged", "step 5: The weights are large."]]
    assert ["define_metric", "*", {"step_metric": "step"}] in rest
    assert calls("finish") == [["finish", 0]]
    assert "Weights & Biases: https://wandb.example/run" in capsys.readouterr().out


def test_a_resumed_run_continues_the_same_run_and_may_go_back(tmp_path, calls, monkeypatch):
    folder = folder_of_a_run(tmp_path)
    for steps in ((5, 10, 15), (10, 15, 20)):  # the second goes on from step 5
        tracker = WandbTracker(folder, print)
        for step in steps:
            tracker.put(Entry(0.0, step, {"loss": 1.0}))
        tracker.close()
    first, second = (call[2] for call in calls("init"))
    assert first == second
    assert [call[1]["step"] for call in calls("log")] == [5, 10, 15, 10, 15, 20]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    tracker = WandbTracker(folder, print)
    tracker.put(Entry(0.0, 25, {"loss": 1.0}))
    tracker.close()
    assert (calls("init")[-1][2]["RUN_ID"], calls("init")[-1][2]["PROJECT"]) == ("mine", "ours"), "the environment's"


def test_a_run_finishes_where_every_call_raises(tmp_path, calls, monkeypatch, capsys):
    monkeypatch.setenv("TROUBLE", "all")
    folder = tmp_path / "run"
    data = {"loader": "procedural", "batch_per_rank": 4, "workers": 0, "procedural_images": 40}
    output = {"folder": str(folder), "log_every": 1, "track": ("wandb",), "evaluate_every": 10, "save_every": 100}
    train(tiny_run("", data=data, output=output))
    printed = capsys.readouterr().out
    assert (
        printed.count("A run must be able to write wandb, got RuntimeError: RuntimeError: no init today; training") == 1
    )
    assert printed.count("must be able to write") == 1
    assert "wandb could not be written until the end: 23 entries are lost." in printed, "20 lines and 3 looks"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20
    assert len(calls("init")) == 1, "it is not tried at each line"


def test_a_process_that_dies_is_started_anew_and_gets_what_waits(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(wandb_tracker, "RESTART_SECONDS", 0.0)
    said: list[str] = []
    tracker = WandbTracker(folder_of_a_run(tmp_path), said.append)
    tracker.put(Entry(0.0, 1, {"loss": 1.0}))
    wait_for(lambda: len(calls("log")) == 1 and tracker.arrived.empty())
    process = tracker.process
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for step in (2, 3, 4):
        tracker.put(Entry(0.0, step, {"loss": 1.0}))
    tracker.close()
    assert [sentence.split(";")[0] for sentence in said] == [
        "A run must be able to write wandb, got RuntimeError: its process ended with code -9",
        "wandb could be written again, with 2 entries that waited or are new.",
    ]
    assert [call[1]["step"] for call in calls("log")] == [1, 2, 3, 4]
    assert len(calls("init")) == 2


@pytest.mark.parametrize("trouble", ["hang-init", "hang-log", "hang-finish"])
def test_a_service_that_hangs_holds_up_nothing(trouble, tmp_path, calls, monkeypatch):
    monkeypatch.setenv("TROUBLE", trouble)
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 1.0)
    said: list[str] = []
    tracker = WandbTracker(folder_of_a_run(tmp_path), said.append)
    tracker.put(Entry(0.0, 1, {"loss": 1.0}))
    wait_for(lambda: calls(trouble.removeprefix("hang-")) or trouble == "hang-finish")
    began = time.monotonic()
    for step in range(2, 5):
        tracker.put(Entry(0.0, step, {"loss": 1.0}))
    assert time.monotonic() - began < 1000, "no wait for the hanging call, which takes 1000 seconds"
    tracker.close()
    assert not tracker.thread.is_alive()
    assert tracker.process is None
    assert any("not ended after 1 seconds" in s or "no answer in 1 seconds" in s for s in said), said


def test_no_answer_in_time_is_said(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("TROUBLE", "hang-log")
    monkeypatch.setattr(wandb_tracker, "ANSWER_SECONDS", 3.0)
    said: list[str] = []
    tracker = WandbTracker(folder_of_a_run(tmp_path), said.append)
    tracker.put(Entry(0.0, 1, {"loss": 1.0}))
    wait_for(lambda: said)
    assert said[0].startswith("A run must be able to write wandb, got TimeoutError: no answer in 3 seconds; training")
    tracker.close()
    assert said[1:] == ["wandb could not be written until the end: one entry is lost."]


def test_a_stopped_process_fills_no_memory(tmp_path, calls, monkeypatch):
    """It takes neither a picture, for which the pipe has no room, nor anything else: the oldest entries are dropped aloud."""
    monkeypatch.setattr(wandb_tracker, "MOST_WAITING", 5)
    monkeypatch.setattr(wandb_process, "FINISH_SECONDS", 1.0)
    said: list[str] = []
    tracker = WandbTracker(folder_of_a_run(tmp_path), said.append)
    tracker.put(Entry(0.0, 1, {"loss": 1.0}))
    wait_for(lambda: len(calls("log")) == 1)
    os.kill(tracker.process.pid, signal.SIGSTOP)
    tracker.put(Entry(0.0, 2, {}, {"attention": bytes(10**6)}))
    wait_for(tracker.arrived.empty)
    for step in range(3, 12):
        tracker.put(Entry(0.0, step, {"loss": 1.0}))
    assert tracker.arrived.qsize() == 5
    assert said == ["5 entries wait for wandb: from now on the oldest are dropped."]
    tracker.close()
    assert "wandb was slower than the run" in said[-1]
    assert tracker.process is None


def test_the_end_of_a_killed_training_is_the_end_of_its_process(tmp_path, calls):
    """The pipe ends without a last word, and W&B is told that the run crashed."""
    process = subprocess.Popen(
        [sys.executable, "-P", wandb_process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=wandb_tracker.environment(folder_of_a_run(tmp_path)),
    )
    answers, _ = process.communicate(b'{"config": {}}\n', timeout=60)
    assert json.loads(answers)["url"] == "https://wandb.example/run"
    assert calls("finish") == [["finish", 1]]
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_an_error_at_the_start(name, monkeypatch):
    monkeypatch.setattr(entry_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=rf"Output.track {name} needs the package {name}, got .*; pip install 'patchlight\["
    ):
        trackers_of((name,))
    assert trackers_of(("auto",)) == trackers_of(()) == []


def test_names_of_trackers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as where both packages are
    assert trackers_of(("auto", "wandb")) == ["tensorboard", "wandb"]
    assert trackers_of(("wandb", "tensorboard")) == ["tensorboard", "wandb"]
    with pytest.raises(
        ValueError, match=r"Output.track may name auto, tensorboard, wandb, got 'wandbb'; perhaps wandb is meant"
    ):
        tiny_run("", output={"track": ("wandbb",)})


def test_tensorboard_gets_looks_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    journal = Journal(tmp_path, track=("tensorboard",))
    journal.look(Clock(0, 20, 0, 5), 0, {"k10": 0.25}, {"attention": png()})
    journal.look(Clock(8, 20, 64, 5), 0, {"k10": 0.5}, {"attention": png(7, 2), "crops": png()})
    journal.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("knn/k10")] == [(0, 0.25), (8, 0.5)]
    pictures = events.Images("attention")
    assert [(e.step, e.width, e.height) for e in pictures] == [(0, 5, 3), (8, 7, 2)]
    assert pictures[0].encoded_image_string == png()
    assert [e.step for e in events.Images("crops")] == [8]


def test_without_trackers_there_are_none(tmp_path):
    journal = Journal(tmp_path, track=())
    journal.look(Clock(0, 20, 0, 5), 0, {"k10": 0.25}, {})
    journal.close()
    assert journal.trackers == []
    assert not [thread for thread in threading.enumerate() if thread.name == "patchlight wandb"]


def records(path: Path) -> list:
    """Of a file that W&B writes offline: chunks with a checksum, a length and a kind, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def test_a_true_run_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "a run"
    data = {"loader": "procedural", "batch_per_rank": 4, "workers": 0, "procedural_images": 40}
    output = {"folder": str(folder), "track": ("wandb",), "evaluate_every": 10, "log_every": 5, "save_every": 100}
    train(tiny_run("", data=data, output=output))
    assert "Weights & Biases: offline; `wandb sync '" in capsys.readouterr().out
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    found = records(file)
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name) == (file.stem[4:], "patchlight", "a run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["output"] == json.loads((folder / "run.json").read_text())["output"]
    history = [r.history for r in found if r.WhichOneof("record_type") == "history"]
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item} for line in history]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses == {line["step"]: line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").open())}
    looks = {row["step"]: row["knn/k10"] for row in rows if "knn/k10" in row}
    assert looks == {line["step"]: line["k10"] for line in map(json.loads, (folder / "knn.jsonl").open())}
    assert list(looks) == [0, 10, 20]
    pictures = sorted(path.name.split("_")[0] for path in file.parent.rglob("*.png"))
    assert pictures == ["attention", "attention", "attention", "crops"]
