"""Profiles of some steps: their times add up, they are where they should be, and without one nothing is recorded."""

import csv
import gzip
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine.tape import TapeRecorder
from engine.tiny_run import on_processes, tiny_run, tiny_trainer, train_tiny
from torch.autograd import DeviceType

from patchlight.engine.graph import WARM_UP
from patchlight.engine.parallel import processes
from patchlight.report import step_profile
from patchlight.report.page import write_report
from patchlight.report.step_profile import SKIPPED, StepProfile, part, summarize
from patchlight_kernels import force

CPU = torch.device("cpu")
IN_STEPS = ("data", "teacher", "student", "losses", "backward", "update")


def profiled_run(folder, steps: int = 4, **output):
    return tiny_run("", output={"folder": str(folder), "save_every": 7, "log_every": 3, "profile": steps} | output)


def read(folder) -> tuple[dict, list[dict]]:
    with (folder / "profile/kernels.csv").open(newline="") as file:
        return json.loads((folder / "profile/profile.json").read_text()), list(csv.DictReader(file))


def test_the_steps_are_after_those_of_a_graphs_recording():
    assert SKIPPED == WARM_UP + 2


def test_a_profile_of_some_steps_and_training_goes_on(tmp_path, capsys):
    began = time.perf_counter()
    trained = train_tiny(profiled_run(tmp_path))
    wall = time.perf_counter() - began
    assert trained["clock"].step == 20
    summary, rows = read(tmp_path)
    assert (summary["first_step"], summary["steps"], summary["kind"]) == (SKIPPED + 1, 4, "operation")
    assert 0 < summary["seconds"] < wall
    assert sum(summary["parts"].values()) == pytest.approx(summary["seconds"])
    assert tuple(summary["parts"]) == (*IN_STEPS, "rest")
    assert all(summary["parts"][name] > 0 for name in IN_STEPS)
    assert summary["parts"]["rest"] > -0.01 * summary["seconds"]
    own = [float(row["self_ms"]) for row in rows]
    assert own == sorted(own, reverse=True)
    assert 0.2 * summary["seconds"] < sum(own) / 1000 < 1.01 * summary["seconds"]
    assert sum(float(row["share"]) for row in rows) == pytest.approx(sum(own) / 1000 / summary["seconds"], abs=0.01)
    calls = {row["name"]: int(row["calls"]) for row in rows}
    assert calls["patchlight::adamw_fwd"] == 4, "one per step"
    assert not [name for name in calls if name.startswith(("part: ", "step "))]
    with gzip.open(tmp_path / "profile/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert {f"step {number}" for number in range(6, 10)} | {f"part: {name}" for name in IN_STEPS} <= names
    assert "step 5" not in names and "step 10" not in names
    printed = capsys.readouterr().out
    assert re.search(r"Steps 6 to 9: [\d.]+ ms each", printed)
    assert re.search(r"backward +│ [\d.]+ +│ [\d.]+%", printed)


def test_without_one_nothing_is_recorded(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the profiler ran")

    monkeypatch.setattr(step_profile, "profile", never)
    monkeypatch.setattr(step_profile, "record_function", never)
    assert train_tiny(profiled_run(tmp_path, steps=0))["clock"].step == 20
    assert not (tmp_path / "profile").exists()


def test_a_profile_changes_no_bit_of_the_training(tmp_path):
    without, with_one = (train_tiny(profiled_run(tmp_path / str(steps), steps)) for steps in (0, 3))
    assert [t["loss"] for t in without["terms"]] == [t["loss"] for t in with_one["terms"]]


def test_what_is_between_the_steps_does_not_count(tmp_path):
    """Neither its time nor its operations: a look, a save."""
    profile, began = StepProfile(tmp_path, 3, 8, CPU), time.perf_counter()
    for number in range(8):
        profile(lambda: torch.ones(3).exp(), number + 1)
        torch.ones(3).cos()
        time.sleep(0.05)
    wall = time.perf_counter() - began
    summary, rows = read(tmp_path)
    names = {row["name"]: row["calls"] for row in rows}
    assert names["aten::exp"] == "3"
    assert "aten::cos" not in names
    assert summary["seconds"] < wall - 8 * 0.05


@pytest.mark.parametrize(
    ("steps", "left", "remedy"), [(16, 20, "use at most 15"), (1, 5, "leave it out"), (15, 19, "use at most 14")]
)
def test_too_many_steps_are_refused_before_the_first(steps, left, remedy, tmp_path):
    with pytest.raises(ValueError, match=rf"got {steps} for a run with {left} steps left; {remedy}\."):
        StepProfile(tmp_path, steps, left, CPU)
    StepProfile(tmp_path, max(left - SKIPPED, 0), left, CPU)


def test_the_run_refuses_too_many_steps(tmp_path):
    run = profiled_run(tmp_path, steps=16)
    with pytest.raises(ValueError, match=r"Output.profile needs the steps that it records and 5 before them, got 16"):
        tiny_trainer(run).fit()
    assert not list(tmp_path.glob("*.json*")), "nothing was begun"


def test_a_resumed_run_records_one_only_if_there_is_none(tmp_path, capsys):
    run = profiled_run(tmp_path, steps=0)
    trainer = tiny_trainer(run)
    for _ in range(7):
        trainer.step()
    trainer.save()
    resumed = replace(run, output=replace(run.output, resume=True, profile=3))
    train_tiny(resumed, steps=None)
    assert read(tmp_path)[0]["first_step"] == 7 + SKIPPED + 1
    capsys.readouterr()
    train_tiny(resumed)  # at its end: nothing to record, and no error
    assert "profile.json is there already; remove" in capsys.readouterr().out
    assert read(tmp_path)[0]["first_step"] == 7 + SKIPPED + 1


def test_a_run_that_ends_before_says_that_there_is_none(tmp_path, capsys):
    profile = StepProfile(tmp_path, 3, 8, CPU)
    for number in range(7):
        profile(int, number + 1)
    profile.close()
    assert "No profile was written: training ended after 2 of its 3 steps." in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
    assert part("data").__class__.__name__ == "nullcontext"


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file, where a folder should be")
    assert train_tiny(profiled_run(tmp_path))["clock"].step == 20
    printed = capsys.readouterr().out
    assert printed.count("profile, got ") == 1
    assert "training goes on without a profile" in printed


def test_steps_that_repeat_a_recording(tmp_path):
    """As with a CUDA graph: the parts within are not seen, the repetition is."""
    run = profiled_run(tmp_path)
    tiny_trainer(run, recorder=TapeRecorder()).fit()
    summary, rows = read(tmp_path)
    assert tuple(summary["parts"]) == ("data", "replay", "rest")
    assert summary["parts"]["replay"] > 0.5 * (summary["seconds"] - summary["parts"]["data"])
    assert "aten::addmm" in {row["name"] for row in rows}
    assert "belong to no part" in summary["note"]


def train_with(run) -> int:
    with force(neighbor_topk="reference"), processes(run.parallel) as mesh:
        tiny_trainer(run, mesh).fit()
        return mesh.rank


def test_of_several_ranks_the_first_is_recorded(tmp_path):
    run = profiled_run(tmp_path)
    assert on_processes(2, train_with, replace(run, data=replace(run.data, batch_per_rank=4))) == [0, 1]
    summary, rows = read(tmp_path)
    assert summary["steps"] == 4
    assert [row for row in rows if "allreduce" in row["name"] or "all_reduce" in row["name"]]


def event(name: str, start: float, end: float, device=DeviceType.CPU) -> SimpleNamespace:
    """In microseconds."""
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, cpu_time_total=end - start, self_cpu_time_total=end - start
    )


def test_on_a_gpu_kernels_are_counted_not_the_host(monkeypatch):
    """With events as torch gives them: spans of names on the GPU are no kernels, and those of a look are left out."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    gpu = DeviceType.CUDA
    events = [
        event("step 6", 0, 1000),
        event("part: replay", 100, 200),
        event("part: wait", 200, 1000),
        event("cudaGraphLaunch", 110, 190),
        event("step 6", 120, 990, gpu),
        event("part: replay", 120, 990, gpu),
        event("gemm", 120, 420, gpu),
        event("gemm", 500, 600, gpu),
        event("softmax", 420, 500, gpu),
        event("a look", 2000, 9000, gpu),
    ]
    summary, rows = summarize(events, 6, [0.001], torch.device("cuda"))
    assert [(row.name, row.calls, row.self_ms, row.share) for row in rows] == [
        ("gemm", 2, pytest.approx(0.4), pytest.approx(0.4)),
        ("softmax", 1, pytest.approx(0.08), pytest.approx(0.08)),
    ]
    assert summary.parts == pytest.approx({"replay": 1e-4, "wait": 8e-4, "rest": 1e-4})
    assert summary.kind == "kernel"
    assert "one CUDA graph" in summary.note
    nothing, _ = summarize([e for e in events if e.device_type != gpu], 6, [0.001], torch.device("cuda"))
    assert "No kernel was seen" in nothing.note


def test_the_page_shows_it_and_names_what_is_damaged(tmp_path):
    train_tiny(profiled_run(tmp_path))
    rows = read(tmp_path)[1]
    page = write_report(tmp_path).read_text()
    assert "<h2>Profile</h2>" in page
    assert 'href="profile/trace.json.gz"' in page
    shown = re.findall(r"<td>([^<]*)</td><td>\d+</td>", page)
    assert shown == [row["name"] for row in rows[:10]]
    assert "<td>backward</td>" in page
    (tmp_path / "profile/kernels.csv").write_bytes(b"\xff\xfe\x00")
    assert "kernels.csv cannot be read" in write_report(tmp_path).read_text()
    (tmp_path / "profile/profile.json").write_text("{")
    page = write_report(tmp_path).read_text()
    assert "profile.json cannot be read" in page
    assert "<h2>Profile</h2>" not in page
