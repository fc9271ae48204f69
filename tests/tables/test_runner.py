"""Small runs of rows: each command once, with its network and settings; what fails is named; what is done is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchlight.evaluation.paper_numbers import tables_named
from patchlight.tables import small
from patchlight.tables.__main__ import chosen_tables, main
from patchlight.tables.commands import Place, places
from patchlight.tables.runner import JOURNAL, Runner

FAKE = """
import pathlib, subprocess, sys, time
words = sys.argv[1:]
print("begin")
if "render" in words:
    folder = pathlib.Path(words[3]) / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.jpg").touch()
if words[0] == "train":
    pathlib.Path(words[words.index("--output.folder") + 1]).mkdir(parents=True)
for word in (REFUSED):
    if word in words:
        print(f"patchlight train: {word} must not be, got it; leave it out.")
        sys.exit(1)
if SLEEP:
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def runner(tmp_path):
    """Makes a runner whose commands do nothing but fail at some words."""

    def made(*refused: str, limit: float = 50, sleep: bool = False) -> Runner:
        path = tmp_path / "fake.py"
        path.write_text(FAKE.replace("(REFUSED)", repr(refused)).replace("SLEEP", repr(sleep)))
        return Runner(tmp_path / "out", limit, (sys.executable, str(path)))

    return made


def commands(runner: Runner) -> list[list[str]]:
    """What the journal says was run."""
    path = runner.out / JOURNAL
    return [json.loads(line)["words"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_each_different_command_runs_once(runner, tmp_path):
    table = tables_named("SERE 12")
    done = runner()
    outcomes = list(done.rows(places(table)))
    assert [outcome.ok for outcome in outcomes] == [True] * 5
    ran = commands(done)
    assert sum(words[0] == "train" for words in ran) == 5
    assert sum("render" in words for words in ran) == 3, "IMAGENET, VOC2012, IMAGENET_S300"
    assert sum(words[1] == "segment" for words in ran) == 10
    assert not list((tmp_path / "out" / "runs").iterdir()), "networks are removed when their rows are done"
    assert len({tuple(words) for words in ran}) == len(ran)
    again = runner()
    assert all(outcome.ok for outcome in again.rows(places(table)))
    assert commands(again) == ran, "what was all right is not done again"


def test_a_training_serves_all_rows_of_its_network(runner):
    done = runner()
    chosen = places(tables_named("SERE 13") + tables_named("SERE 8") + tables_named("SERE 12"))
    assert all(outcome.ok for outcome in done.rows(chosen))
    plain = [
        words for words in commands(done) if words[:2] == ["train", "sere_vits16_ins300"] and words[2] == "--data.path"
    ]
    assert len(plain) == 1, "of all three tables"


def test_what_fails_is_named_and_the_rest_goes_on(runner):
    done = runner("--objectives.options.1.heads")
    outcomes = list(done.rows(places(tables_named("SERE 12"))))
    assert [outcome.ok for outcome in outcomes] == [False, False, True, False, False]
    assert outcomes[0].sentence == "--objectives.options.1.heads must not be, got it; leave it out."
    assert str(outcomes[0].place) == "SERE, Table 12, row 1: DINO + SERE, ViT-S/16 (M 1)"
    assert sum(words[1] == "segment" for words in commands(done)) == 2, "no network, no evaluation"
    mended = runner()
    assert all(outcome.ok for outcome in mended.rows(places(tables_named("SERE 12"))))


def test_a_network_that_was_removed_is_trained_again_for_what_failed(runner):
    first = runner("segment")
    (outcome,) = first.rows(places(tables_named("SERE 7"))[3:4])
    assert not outcome.ok
    mended = runner()
    (outcome,) = mended.rows(places(tables_named("SERE 7"))[3:4])
    assert outcome.ok
    assert sum(words[0] == "train" for words in commands(mended)) == 2


def test_what_a_killed_command_left_is_removed(runner):
    done = runner()
    left = done.out / "runs" / "x"
    left.mkdir(parents=True)
    (left / "half").write_text("a run")
    kept = done.out / "other"
    kept.mkdir()
    assert done.do(["train", "x", "--output.folder", str(left), "--data.path", str(kept)]).ok
    assert not (left / "half").exists()
    assert kept.is_dir()


def test_a_slow_command_ends_with_its_processes(runner):
    done = runner(limit=2, sleep=True)
    outcome = done.do(["evaluate", "x"])
    assert (outcome.ok, outcome.sentence) == (False, "it takes longer than 2 seconds")
    assert outcome.seconds < 40
    child = Path(outcome.log).read_text().split()[-1]
    for _ in range(300):  # a killed process takes a while to end
        status = Path("/proc", child, "status")
        try:
            ended = "State:\tZ" in status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            ended = True
        if ended:
            return
        time.sleep(0.1)
    raise AssertionError("what it started must end too")


def test_half_a_line_of_the_journal_is_no_error(runner):
    done = runner()
    done.do(["train", "x", "--output.folder", str(done.out / "runs" / "x")])
    with (done.out / JOURNAL).open("a") as file:
        file.write('{"words": ["tra')
    assert len(runner().done) == 1
    done.forget()
    assert not runner().done


def test_the_small_runs_keep_network_and_settings(tmp_path):
    """The row's own words come first, and only those of small.toml are added."""
    (place, *_) = places(tables_named("PQCL 7"))
    words = small.small_training(place.row, tmp_path)
    own = [*place.row.train.split(), "--data.path"]
    assert words[1 : len(own) + 1] == own
    assert words[len(own) + 1] == str(tmp_path / "data" / "IMAGENET" / "train")
    allowed = {
        "--data.batch-per-rank", "--data.workers", "--data.loader", "--schedule.epochs", "--schedule.steps-per-epoch",
        "--optim.warmup-epochs", "--parallel.precision", "--output.evaluate-every", "--output.track", "--output.keep",
    }  # fmt: skip
    assert {word for word in small.settings()["train"]["flags"].split() if word.startswith("--")} == allowed
    (linear,) = small.small_evaluations(place, tmp_path)
    assert linear[:4] == ["evaluate", "linear", "--data", str(tmp_path / "data" / "IMAGENET")]
    (moco, *_) = places(tables_named("SelfPatch 3"))
    (davis,) = small.small_evaluations(moco, tmp_path)
    assert davis[davis.index("--checkpoint") + 1] == "random:resnet50", "a random start in place of a file of others"


def test_every_row_has_data_to_draw():
    for place in places(chosen_tables(())):
        for measure in place.table.measures:
            for step in measure.evaluate:
                assert small.data_names(step.split()), step


def test_names_on_the_command_line(capsys):
    assert [t.title for t in chosen_tables(["SERE", "5", "PQCL", "Figure", "3"])] == ["SERE, Table 5", "PQCL, Figure 3"]
    assert [t.title for t in chosen_tables(["SERE 5", "sere 5"])] == ["SERE, Table 5"]
    main(["show", "SERE", "4"])
    shown = capsys.readouterr().out
    assert "patchlight evaluate semi --data IMAGENET --names 1percent.txt --checkpoint runs/sere-dino-s\n" in shown
    assert "# row 2: DINO + SERE, ViT-S/16, 1 % top1 55.9, 1 % top5 81.0, 10 % top1 71.5, 10 % top5 90.6\n" in shown
    main(["list", "PASS"])
    assert "PASS, Table 3 (b)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["run", "SERE", "55"])
    assert "A table must be one of the papers'" in str(end.value)


def test_stopping_keeps_what_ran(tmp_path):
    """Ctrl-C ends the command that runs, and the next call with --resume goes on."""
    code = (
        "import signal, sys; from patchlight.tables import runner; from patchlight.tables.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests may run in the background, where it is ignored
        f"runner.Runner.__init__.__defaults__ = ((sys.executable, {str(tmp_path / 'fake.py')!r}),)\n"
        f"main(['run', 'SERE', '12', '--out', {str(tmp_path / 'out')!r}, *sys.argv[1:]])"
    )
    (tmp_path / "fake.py").write_text(FAKE.replace("(REFUSED)", "()").replace("SLEEP", "words[1] == 'segment'"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "out" / JOURNAL, time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.is_file() or '"train"' not in journal.read_text()):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopped: 0 of 5 rows were tried; --resume leaves out what was all right" in said
    kept = journal.read_text()
    (tmp_path / "fake.py").write_text(FAKE.replace("(REFUSED)", "()").replace("SLEEP", "False"))
    resumed = subprocess.run([sys.executable, "-c", code, "--resume"], capture_output=True, text=True, timeout=400)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert journal.read_text().startswith(kept)
    assert "all 5 rows run" in resumed.stdout


@pytest.mark.parametrize("name", ["SelfPatch 6", "PASS Table 3 (a)"])
def test_a_sample_of_rows_runs(name, tmp_path):
    """The real commands; `make tables` runs them all."""
    (place,) = places(tables_named(name))[:1]
    runner = Runner(tmp_path / "with space", small.settings()["limit"] * 3)
    outcome = runner.row(Place(place.table, 1))
    assert outcome.ok, outcome.sentence
