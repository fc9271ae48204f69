"""Numbers of a run: read at log lines only, correct over steps, ranks and restarts."""

import io
import json
import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from engine.tiny_run import DINO, IBOT, NoiseLoader, on_processes, tiny_run
from rich.console import Console

from patchlight.cost import Cost, backbone_flops, flops_per_image
from patchlight.data.procedural import ProceduralSource
from patchlight.engine import metrics as metrics_module
from patchlight.engine.assembly import build_metrics, build_objectives, build_trainer
from patchlight.engine.metrics import Metrics
from patchlight.engine.parallel import Mesh, processes
from patchlight.engine.probe import TeacherProbe
from patchlight.engine.sentinels import Diagnosis
from patchlight.records import Clock
from patchlight.report.console import Display
from patchlight.report.journal import Journal
from patchlight.report.log_file import append, read_lines, to_bytes
from patchlight.run import Model, Parallel

ALONE = Mesh(torch.device("cpu"))


def clock(step: int, total: int = 40, epoch: int = 10, batch: int = 8) -> Clock:
    return Clock(step, total, step * batch, epoch)


def add(metrics: Metrics, *losses: float, **more: float) -> None:
    for loss in losses:
        metrics.add({"loss": torch.tensor(loss)} | {name: torch.tensor(value) for name, value in more.items()})


def lines(folder) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


def test_adding_never_reads_the_device(tmp_path):
    """Tensors on the meta device have no values: reading one fails."""
    metrics = Metrics(ALONE, Journal(tmp_path))
    terms = {"loss": torch.empty((), device="meta", requires_grad=True), "dino/cls": torch.empty((), device="meta")}
    for _ in range(3):
        metrics.add(terms)
    assert not metrics.sums[("loss", "dino/cls")].requires_grad
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        metrics.log(clock(3), {})


def test_a_line_is_the_mean_since_the_last_one(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path), {"dino/cls": 64})
    for losses in ([1.0, 2.0, 6.0], [10.0, 20.0]):
        for loss in losses:
            metrics.add({"loss": torch.tensor(loss), "dino/cls": torch.tensor(2 * loss)})
        step = 3 if len(losses) == 3 else 5
        returned = metrics.log(clock(step), {"lr": 0.5, "data/wait_seconds": 0.25})
    assert returned == {"loss": 15.0, "dino/cls": 30.0, "lr": 0.5, "data/wait_seconds": 0.25}
    first, second = lines(tmp_path)
    assert (first["loss"], first["steps"], first["step"], first["images"]) == (3.0, 3, 3, 24)
    assert (second["loss"], second["steps"], second["epoch"], second["total"]) == (15.0, 2, 0.5, 40)
    assert second["dino/cls/ln_k"] == pytest.approx(30 / math.log(64))
    assert second["lr"] == 0.5


def test_sums_do_not_lose_small_numbers(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path))
    for _ in range(3000):
        metrics.add({"loss": torch.tensor(11.0904)})
    assert metrics.log(clock(3000, 9000), {})["loss"] == pytest.approx(float(torch.tensor(11.0904)), rel=1e-12)


def test_one_bad_step_does_not_hide_the_others(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path), {"dino/cls": 64})
    add(metrics, 1.0, float("nan"), 3.0, float("inf"), **{"dino/cls": 5.0})
    record = metrics.log(clock(4), {})
    assert record["loss"] == 2.0
    assert record["loss/nonfinite"] == 2
    assert record["dino/cls"] == 5.0
    assert "dino/cls/nonfinite" not in record
    add(metrics, float("nan"))
    assert math.isnan(metrics.log(clock(5), {})["loss"])
    assert lines(tmp_path)[1]["loss"] is None, "a file of JSON has no NaN"
    add(metrics, 1.0, **{"dino/cls": float("nan")})
    metrics.log(clock(6), {})
    assert lines(tmp_path)[2]["dino/cls/nonfinite"] == 1
    assert [name for name in lines(tmp_path)[2] if name.endswith("ln_k")] == ["dino/cls/ln_k"]


def test_speed_waiting_and_use_of_the_device(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    metrics = Metrics(ALONE, Journal(tmp_path), cost=Cost(flops_per_image=1e9, peak_flops=1e11))
    now[0] = 160.0  # building and compiling
    for _ in range(5):
        add(metrics, 1.0)
        now[0] += 2.0
    now[0] -= 2.0
    metrics.log(clock(5), {"data/wait_seconds": 2.0})
    for _ in range(4):
        add(metrics, 1.0)
        now[0] += 1.0
    metrics.log(clock(9), {"data/wait_seconds": 1.0})
    first, second = lines(tmp_path)
    assert first["speed/images_per_second"] == pytest.approx(4 * 8 / 8.0), "the first step does not count"
    assert first["data/wait_share"] == pytest.approx(2.0 / 5 * 4 / 8.0)
    assert second["speed/images_per_second"] == pytest.approx(4 * 8 / 4.0)
    assert second["speed/seconds_per_step"] == pytest.approx(1.0)
    assert second["data/wait_share"] == pytest.approx(0.25)
    assert second["speed/mfu"] == pytest.approx(8 * 1e9 / 1e11)
    assert second["seconds"] == pytest.approx(12.0)
    assert second["memory/gib"] > 0.01


def test_the_epochs_file_has_dinos_format(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path))
    for before, step in ((0, 4), (4, 10), (10, 14), (14, 20), (20, 24)):
        add(metrics, *[float(step)] * (step - before), **{"dino/cls": 1.0})
        metrics.log(clock(step), {"lr": step / 100, "weight_decay": 0.04})
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert records[0]["train_loss"] == pytest.approx((4 * 4 + 6 * 10) / 10)
    assert records[1]["train_loss"] == pytest.approx((4 * 14 + 6 * 20) / 10)
    assert records[1]["train_lr"] == pytest.approx((4 * 0.14 + 6 * 0.20) / 10)
    assert {"train_wd", "train_dino/cls"} <= records[0].keys()


def test_short_epochs_between_two_lines_are_written(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path))
    add(metrics, *[2.0] * 35)
    metrics.log(clock(35), {})
    records = read_lines(tmp_path / "log.txt", "epoch")
    assert [(r["epoch"], r["train_loss"]) for r in records] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_an_epoch_without_a_finite_value_says_null(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path))
    for step, loss in ((5, 2.0), (10, float("nan")), (15, float("nan")), (20, float("inf")), (30, 4.0)):
        add(metrics, *[loss] * (10 if step == 30 else 5), **{"dino/cls": 1.0})
        metrics.log(clock(step), {"lr": 0.5})
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["train_loss"] for record in records] == [2.0, None, 4.0]
    assert [record["train_dino/cls"] for record in records] == [1.0, 1.0, 1.0]
    assert [(record["epoch"], record["steps"]) for record in records] == [(0, 10), (1, 10), (2, 10)]


class BadStretch(NoiseLoader):
    """Pixels that are not finite in some steps."""

    steps = range(0)

    def __next__(self):
        views = super().__next__()
        if self.samples // self.batch in self.steps:
            views.global_crops.pixels[:] = float("nan")
        return views


def trainer_of(run, bad: range):
    trainer = build_trainer(run, None, BadStretch(run))
    trainer.loader.steps = bad
    trainer.probe = TeacherProbe(run, ProceduralSource(40, size=16), trainer.mesh)
    return trainer


@pytest.mark.parametrize(
    ("log_every", "bad", "null"),
    [(5, range(6, 11), [1]), (1, range(10, 11), []), (1, range(1, 6), [0])],
    ids=["a window without a finite value", "the last step of an epoch", "the first epoch"],
)
def test_a_run_passes_an_epoch_whose_last_window_has_no_finite_value(tmp_path, capsys, log_every, bad, null):
    """It saves, and resumes."""
    output = {"folder": str(tmp_path), "save_every": 5, "log_every": log_every, "keep": 9}
    optim = {"base_lr": 1e-3 * 32, "warmup_epochs": 1, "most_refused": 9}
    run = tiny_run(tmp_path, output=output, optim=optim)
    trainer_of(run, bad).fit()
    before = {name: (tmp_path / name).read_bytes() for name in ("log.txt", "knn.jsonl", "diagnoses.jsonl")}
    assert [r["epoch"] for r in read_lines(tmp_path / "log.txt", "epoch") if r["train_loss"] is None] == null
    for step in (15, 20):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    resumed = trainer_of(replace(run, output=replace(run.output, resume=True)), bad)
    resumed.fit()
    assert "resumed at step" in capsys.readouterr().out
    assert resumed.clock.step == 20
    assert [line["step"] for line in lines(tmp_path)] == list(range(log_every, 21, log_every))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "not finite" in (tmp_path / "report.html").read_text(), "a gap"


def test_a_run_comes_to_its_end_without_its_log_files(tmp_path, capsys):
    """And the next one uses their places as soon as it can."""
    names = ("metrics.jsonl", "log.txt", "knn.jsonl", "report.html", "plots")
    for name in names[:-1]:
        (tmp_path / name).mkdir()
    (tmp_path / "plots").write_text("a file, where a folder should be")
    run = tiny_run(tmp_path)
    trainer_of(run, range(0)).fit()
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(f"A run must be able to write {name}, got ") == 1, name
    for name in names[:2]:
        assert f"{name} could not be written until the end" in printed, "what is lost is said"
    for name in names[:3]:
        (tmp_path / name).rmdir()
    run = replace(run, schedule=replace(run.schedule, epochs=5), output=replace(run.output, resume=True))
    with pytest.warns(UserWarning, match="epochs was 4 and is 5"):
        trainer_of(run, range(0)).fit()
    assert [line["step"] for line in lines(tmp_path)] == [25]
    assert [line["epoch"] for line in read_lines(tmp_path / "log.txt", "epoch")] == [4]
    assert [line["step"] for line in read_lines(tmp_path / "knn.jsonl")] == [20, 25], (
        "the look that was lost is taken again"
    )


def test_an_epochs_line_does_not_read_earlier_lines_again(tmp_path):
    metrics = Metrics(ALONE, Journal(tmp_path))
    for step in (5, 10):
        add(metrics, *[float(step)] * 5)
        metrics.log(clock(step), {})
        (tmp_path / "metrics.jsonl").write_text("")
    assert read_lines(tmp_path / "log.txt", "epoch")[0]["train_loss"] == 7.5


def test_lines_of_epochs_are_those_of_a_run_that_was_never_interrupted(tmp_path):
    """Resumed within an epoch, after an epoch whose line the crash took, and behind a damaged line."""

    def log(folder, steps) -> None:
        metrics = Metrics(ALONE, Journal(folder, track=()))
        for step in steps:
            add(metrics, *[float(step)] * 5)
            metrics.log(clock(step), {})
        metrics.close()

    log(tmp_path / "whole", range(5, 41, 5))
    whole = (tmp_path / "whole" / "log.txt").read_text()
    log(tmp_path / "cut", range(5, 21, 5))
    path = tmp_path / "cut" / "log.txt"
    path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"train_lo')
    log(tmp_path / "cut", range(20, 26, 5))  # from a checkpoint of step 15
    log(tmp_path / "cut", range(30, 41, 5))
    assert path.read_text() == whole
    assert (tmp_path / "cut" / "log.txt.damaged").read_text() == '{"train_lo\n'


def test_a_lost_file_does_not_invent_lines_of_epochs(tmp_path):
    for steps in (range(5, 21, 5), range(25, 41, 5)):
        metrics = Metrics(ALONE, Journal(tmp_path))
        for step in steps:
            add(metrics, *[1.0] * 5)
            metrics.log(clock(step), {})
        (tmp_path / "metrics.jsonl").unlink()
    assert [record["epoch"] for record in read_lines(tmp_path / "log.txt", "epoch")] == [0, 1, 2, 3]


def test_a_start_from_nothing_in_an_old_folder_doubles_no_lines(tmp_path):
    """As after a crash before the first checkpoint."""
    for _ in range(2):
        metrics = Metrics(ALONE, Journal(tmp_path))
        for step in (5, 10):
            add(metrics, *[1.0] * 5)
            metrics.log(clock(step), {})
            metrics.diagnose(clock(step), Diagnosis("uniform collapse", "Lower the temperature."))
    for name, key in (("metrics.jsonl", "step"), ("diagnoses.jsonl", "step"), ("log.txt", "epoch")):
        found = [line[key] for line in read_lines(tmp_path / name, key)]
        assert found == ([0] if key == "epoch" else [5, 10])


def test_a_resumed_run_removes_the_lines_of_later_steps(tmp_path):
    first = Metrics(ALONE, Journal(tmp_path))
    for step in (5, 10, 15, 20):
        add(first, *[1.0] * 5)
        first.log(clock(step), {})
        first.diagnose(clock(step), Diagnosis("uniform collapse", "Lower the temperature."))
    seconds = lines(tmp_path)[1]["seconds"]
    second = Metrics(ALONE, Journal(tmp_path))  # resumed from step 10
    assert len(lines(tmp_path)) == 4, "nothing happens before the first line"
    add(second, *[7.0] * 5)
    second.log(clock(15), {})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(5, 1.0), (10, 1.0), (15, 7.0)]
    assert lines(tmp_path)[2]["seconds"] >= seconds
    assert [line["step"] for line in read_lines(tmp_path / "diagnoses.jsonl")] == [5, 10]
    assert [line["epoch"] for line in read_lines(tmp_path / "log.txt", "epoch")] == [0]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    append(tmp_path / "metrics.jsonl", to_bytes({"step": 5, "steps": 5, "seconds": 1.0, "loss": 1.0}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "los')
    assert len(lines(tmp_path)) == 1
    metrics = Metrics(ALONE, Journal(tmp_path))
    add(metrics, *[1.0] * 5)
    metrics.log(clock(10), {})
    assert [line["step"] for line in lines(tmp_path)] == [5, 10]


def two_ranks(folder: str) -> dict:
    torch.set_num_threads(1)
    with processes(Parallel()) as mesh:
        metrics = Metrics(mesh, Journal(folder) if mesh.rank == 0 else None)
        for loss in (1.0, 2.0):
            metrics.add({"loss": torch.tensor(loss + 10 * mesh.rank)})
        if mesh.rank == 1:
            metrics.add({"loss": torch.tensor(float("nan"))})
        else:
            metrics.add({"loss": torch.tensor(3.0)})
        means = metrics.log(clock(3, batch=16), {"data/wait_seconds": 0.5 * mesh.rank})
    return {"means": means, "rank": mesh.rank}


def test_a_line_is_the_mean_over_ranks_and_the_longest_wait(tmp_path):
    results = on_processes(2, two_ranks, str(tmp_path))
    for result in results:
        assert result["means"]["loss"] == pytest.approx((1 + 2 + 11 + 12 + 3) / 5)
        assert result["means"]["loss/nonfinite"] == 1
    (line,) = lines(tmp_path)
    assert line["data/wait_seconds"] == 0.5


def test_diagnoses_are_printed_and_saved(tmp_path):
    printed = io.StringIO()
    metrics = Metrics(ALONE, Journal(tmp_path, Display(Console(file=printed, width=200))))
    metrics.diagnose(clock(7), Diagnosis("uniform collapse", "Lower the temperature."))
    assert "step 7: uniform collapse: Lower the temperature." in printed.getvalue()
    assert read_lines(tmp_path / "diagnoses.jsonl")[0]["name"] == "uniform collapse"


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    printed = io.StringIO()
    metrics = Metrics(ALONE, Journal(tmp_path, Display(Console(file=printed, width=60))), {"dino/cls": 64})
    for step in (5, 10):
        for _ in range(5):
            metrics.add({"loss": torch.tensor(3.5), "dino/cls": torch.tensor(4.0)})
        metrics.log(clock(step), {"lr": 0.001, "data/wait_seconds": 0.0})
    text = printed.getvalue()
    assert "\x1b" not in text
    assert text.count("\n") == 2, "one line each, however narrow"
    last = text.splitlines()[1]
    for words in ("Epoch: [1.00]  [10/40]", "eta: 0:00:", "loss: 3.5000", "dino/cls: 4.0000", "dino/cls/ln_k: 0.9618",
                  "lr: 0.001", "time: ", "data: 0.0000", "images/s: ", "max mem: "):  # fmt: skip
        assert words in last, (words, last)


def test_a_progress_bar_on_a_terminal(tmp_path):
    printed = io.StringIO()
    display = Display(Console(file=printed, width=120, force_terminal=True))
    metrics = Metrics(ALONE, Journal(tmp_path, display))
    for step in (20, 40):
        add(metrics, *[1.0] * 20)
        metrics.log(clock(step), {"data/wait_seconds": 0.0})
    metrics.close()
    assert display.progress is None, "closed at the end"
    assert "40/40 steps" in printed.getvalue()
    assert printed.getvalue().endswith("\x1b[?25h"), "the cursor is back"


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = Metrics(ALONE, Journal(tmp_path, track=("tensorboard",)))
        add(metrics, *[2.0] * 40)
        metrics.log(clock(40), {})
        metrics.close()
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(40, 2.0)]


def test_tensorboard_leaves_out_what_a_resumed_run_wrote_of_later_steps(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((10, 20, 30), (20,)):
        metrics = Metrics(ALONE, Journal(tmp_path, track=("tensorboard",)))
        for step in steps:
            add(metrics, *[float(step + len(steps))] * 10)
            metrics.log(clock(step), {})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 13.0), (20, 21.0)]


def test_build_metrics_follows_the_run(tmp_path):
    run = tiny_run(tmp_path, options=(DINO, IBOT))
    metrics = build_metrics(run, ALONE, build_objectives(run))
    assert metrics.prototypes == {"dino/cls": 37, "ibot/cls": 37, "ibot/patch": 37}
    assert metrics.journal.folder == tmp_path
    assert metrics.cost.peak_flops is None
    globals_, locals_ = (backbone_flops(run.model, size) for size in (16, 12))
    assert flops_per_image(run) == pytest.approx(4 * 2 * globals_ + 3 * 2 * locals_)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        (Model(), 224, 9.20e9),
        (Model(), 96, 1.62e9),
        (Model("swin_tiny", 32, summary="mean"), 224, 8.98e9),
        (Model("resnet50", 32, summary="mean"), 224, 8.18e9),
    ],
)
def test_flops_of_published_networks(model, size, expected):
    """Twice the published multiply-adds (4.6, 0.8, 4.5 and 4.1 G)."""
    assert backbone_flops(model, size) == pytest.approx(expected, rel=0.01)


def test_flops_of_a_vit_are_those_of_the_formula():
    tokens, patches, width, depth = 17, 16, 20, 2
    by_hand = depth * (24 * tokens * width**2 + 4 * tokens**2 * width) + 6 * patches * 4**2 * width
    model = Model(image_size=16, patch_size=4, sizes={"width": width, "depth": depth, "heads": 2})
    assert backbone_flops(model, 16) == by_hand


def test_nothing_is_written_before_the_first_line(tmp_path):
    folder = tmp_path / "run"
    metrics = Metrics(ALONE, Journal(folder))
    add(metrics, 1.0)
    assert not folder.exists(), "the trainer must be able to refuse an occupied folder"
    metrics.log(clock(1), {})
    metrics.close()
    assert {"metrics.jsonl", "environment.json", "report.html"} <= {path.name for path in folder.iterdir()}
