"""A rented GPU's plan: parts that hang, fail or are interrupted cost nothing but themselves, and the archive is always there."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from bench import loader, methods, report, step, step_on_gpu, study, tables, update
from bench.gpu import command, losses, ops_slice, predicted, publish, race
from bench.gpu.plan import MUST, PLAN, Part, in_order, pick, sums
from bench.gpu.results import digest, result_of
from bench.gpu.runner import RESERVE, Runner
from bench.rows import write_rows
from parity import ROOT

from patchlight.usage import call

PRINTS = "import sys; open(sys.argv[1], 'a').write('x'); print('a number: 7')"
WAITS = "import time; print('it began', flush=True); time.sleep(600)"
HANGS = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('it began', flush=True); time.sleep(600)"
)


def part(name: str, code: str, seconds: int = 60, **others) -> Part:
    return Part(name, ("{python}", "-c", code, "{folder}/ran_" + name), seconds, **others)


def run(folder: Path, parts: list[Part], seconds: float = 300.0, reserve: float = 0.0) -> Runner:
    runner = Runner(folder / "hour", folder / "out/hour.tar.gz", seconds, grace=0.5, reserve=reserve)
    runner.run(parts)
    return runner


def names_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as file:
        return set(file.getnames())


def test_a_part_that_hangs_or_fails_does_not_end_the_others(tmp_path):
    parts = [
        part("first", PRINTS),
        part("hangs", HANGS, seconds=4),
        part("waits", WAITS, seconds=4),
        part("fails", "import sys; print('no such thing'); sys.exit(3)"),
        part("absent", PRINTS, needs=("a-program-that-nobody-has",)),
        part("no_module", PRINTS, needs=("no_such.module",)),
        part("last", PRINTS),
    ]
    began = time.monotonic()
    found = run(tmp_path, parts).outcomes
    assert time.monotonic() - began < 120
    assert [found[p.name].state for p in parts] == [
        "done",
        "failed",
        "failed",
        "failed",
        "left out",
        "left out",
        "done",
    ]
    assert found["first"].result == "a number: 7"
    assert found["hangs"].result == found["waits"].result == "over its limit of 4 s: it began"
    assert found["fails"].result == "status 3: no such thing"
    assert found["absent"].result == "a-program-that-nobody-has is not here"
    archived = names_in(tmp_path / "out/hour.tar.gz")
    assert archived >= {f"hour/{name}" for name in ("first.txt", "hangs.txt", "last.txt", "summary.md", "parts.json")}
    summary = (tmp_path / "hour/summary.md").read_text()
    assert "| hangs | failed | " in summary and "| last | done | " in summary
    assert "## fails failed\n\n```\nno such thing\n```" in summary
    assert not list(tmp_path.rglob("*.part"))


def test_a_second_call_runs_what_is_not_done_and_new_parts_first(tmp_path):
    fails_once = (
        "import os, sys; known = os.path.exists(sys.argv[1]); open(sys.argv[1], 'a').write('x'); sys.exit(not known)"
    )
    parts = [part("done", PRINTS), part("fails", fails_once), part("new", PRINTS)]
    run(tmp_path, parts[:2])
    runner = Runner(tmp_path / "hour", tmp_path / "hour.tar.gz", 300, reserve=0)
    said: list[str] = []
    runner.say = said.append
    runner.run(parts)
    assert {name: found.state for name, found in runner.outcomes.items()} == dict.fromkeys(
        ("done", "fails", "new"), "done"
    )
    ran = {name: (tmp_path / f"hour/ran_{name}").read_text() for name in ("done", "fails", "new")}
    assert ran == {"done": "x", "fails": "xx", "new": "x"}
    starts = [line.split(":")[0] for line in said if "at most" in line]
    assert starts == ["new", "fails"]


def test_what_does_not_fit_is_dropped_and_said(tmp_path):
    runner = run(tmp_path, [part("long", PRINTS, seconds=10_000), part("short", PRINTS, seconds=60)], seconds=120)
    assert [found.state for found in runner.outcomes.values()] == ["dropped", "done"]
    assert runner.outcomes["long"].result.startswith("limit 10000 s, 1")
    assert "dropped" in (tmp_path / "hour/summary.md").read_text()
    again = run(tmp_path, [part("long", PRINTS, seconds=100)])
    assert again.outcomes["long"].state == "done"


def test_the_summary_has_what_earlier_calls_ran(tmp_path):
    plan = [part("one", PRINTS), part("two", PRINTS), part("three", PRINTS)]
    run(tmp_path, plan[:1])
    Runner(tmp_path / "hour", tmp_path / "hour.tar.gz", 300, reserve=0).run(plan[1:2], plan)
    summary = (tmp_path / "hour/summary.md").read_text()
    assert "| one | done |" in summary and "| two | done |" in summary and "three" not in summary


def test_a_part_is_stopped_at_the_end_of_the_time(tmp_path):
    began = time.monotonic()
    found = run(tmp_path, [part("hangs", HANGS, seconds=3)], seconds=2.0).outcomes["hangs"]
    assert found.state == "failed" and time.monotonic() - began < 60


STOPPABLE = """
import sys
from pathlib import Path
from bench.gpu.plan import Part
from bench.gpu.runner import Runner
hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
parts = [Part("first", ("{python}", "-c", "print('a number: 7')"), 60), Part("hangs", ("{python}", "-c", hangs), 600)]
Runner(Path(sys.argv[1]) / "hour", Path(sys.argv[1]) / "hour.tar.gz", 1000).run(parts)
"""


def wait_for(what) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_an_archive(number, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "ssl", "kernels"))}
    process = subprocess.Popen([sys.executable, "-c", STOPPABLE, tmp_path], env=environment, stderr=subprocess.DEVNULL)
    output = tmp_path / "hour/hangs.txt"
    wait_for(lambda: output.exists() and output.read_text().strip())
    process.send_signal(number)
    assert process.wait(60) != 0
    assert not is_running(int(output.read_text().split()[0]))
    with tarfile.open(tmp_path / "hour.tar.gz") as file:
        known = json.load(file.extractfile("hour/parts.json"))
        assert "| hangs | stopped | " in file.extractfile("hour/summary.md").read().decode()
    assert {name: found["state"] for name, found in known.items()} == {"first": "done", "hangs": "stopped"}


def test_without_a_gpu_it_shows_its_plan_and_refuses_to_run(tmp_path, capsys, monkeypatch):
    command.measure_gpu(plan=True)
    shown = capsys.readouterr().out
    assert all(found.name in shown for found in PLAN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="this machine must have a CUDA device, got none; see the plan with --plan"):
        command.measure_gpu(folder=tmp_path / "hour")
    with pytest.raises(SystemExit, match="--only must name parts of the plan, got nothing_like_it; choose among env"):
        pick(PLAN, ["nothing_like_it"])
    assert [found.name for found in pick(PLAN, ["update", "race"])] == ["race", "update"]


def test_the_plan_fits_its_machine():
    assert len({found.name for found in PLAN}) == len(PLAN)
    assert [found.importance for found in PLAN] == [found.importance for found in in_order(PLAN)]
    assert sums([found for found in PLAN if found.importance == MUST])[-1] <= 8 * 60 - RESERVE
    assert all(found.seconds <= 120 for found in PLAN), "one part must not take the time of all others"
    assert all(found.words(python="python", folder="f", cores="16") for found in PLAN)
    programs = {words[2] for words in (found.command for found in PLAN) if words[1] == "-m"}
    assert programs <= {"pytest", "bench", *(f"bench.gpu.{path.stem}" for path in (ROOT / "bench/gpu").glob("*.py"))}


COMMANDS = {
    "step": step.measure_step,
    "update": update.measure_update,
    "loader": loader.measure_loader,
    "study": study.measure_study,
    "bench.gpu.ops_slice": ops_slice.main,
}


@pytest.mark.parametrize("planned", PLAN, ids=lambda planned: planned.name)
def test_every_command_is_understood(planned):
    words = planned.words(python="python", folder="f", cores="16")
    name, options = (words[3], words[4:]) if words[2] == "bench" else (words[2], words[3:])
    if name not in COMMANDS:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    got: dict = {}
    wrapped = functools.wraps(COMMANDS[name])(lambda *args, **named: got.update(named))
    call(wrapped, options, "bench")
    assert str(got["out"]) == f"f/{planned.rows}"
    if name == "step":
        known = step_on_gpu.providers(methods.METHODS["dino"], methods.dino(methods.LAPTOP))
        assert set(got["suite"].providers) <= set(known)
    if name == "loader":
        assert set(got["suite"].providers) <= set(loader.PROVIDERS)
    if name == "bench.gpu.ops_slice":
        assert len(ops_slice.find_cases(got["cases"])) == len(got["cases"])


def test_results_in_a_line(tmp_path):
    timed = {"op": "adamw", "case": "vit", "dtype": "float32", "mode": "fwd", "status": "ok"}
    rows = [
        timed | {"provider": "eager", "median_ms": "0.3"},
        timed | {"provider": "patchlight cuda", "median_ms": "0.2"},
        timed | {"provider": "patchlight triton", "median_ms": "0.1"},
        timed | {"provider": "lightly", "median_ms": "", "status": "cannot run: no"},
    ]
    assert digest(rows) == "adamw vit fwd 100 us patchlight triton (3x eager); 1 rows cannot run: no"
    steps = [{"op": "step", "provider": "patchlight", "images_per_s": "1744.4", "status": "ok"}]
    assert digest(steps) == "patchlight 1744 images/s"
    planned = Part("p", (), 10, rows="p.csv")
    (tmp_path / "p.txt").write_text("Traceback\nValueError: no\n\n")
    write_rows(rows, tmp_path / "p.csv")
    assert result_of(planned, tmp_path, 1, 10) == ("failed", f"status 1: ValueError: no; {digest(rows)}"[:160])
    assert result_of(planned, tmp_path, None, 10)[1].startswith("over its limit of 10 s: adamw vit")


@pytest.fixture
def steps_without_a_gpu(monkeypatch):
    """Providers whose steps are not run; one of them fails."""

    def measured(build, seconds):
        if build == "fails":
            raise KeyError
        return {"median_ms": 10.0, "launches": 2, "device_ms": 9.0}, {"a<kernel>": [2, 9.0], "b": [1, 90.0]}

    row = {"op": "step", "hardware": "a GPU", "dtype": "bf16"}
    monkeypatch.setattr(step_on_gpu, "measure_provider", measured)
    monkeypatch.setattr(step_on_gpu, "providers", lambda *_: {"official eager": "ok", "patchlight": "fails", "c": "ok"})
    monkeypatch.setattr(step_on_gpu, "case_columns", lambda op, case, *_: row | {"case": case})
    monkeypatch.setattr(step_on_gpu, "flops_of", lambda _: 10**9)
    monkeypatch.setattr(step_on_gpu, "build_trainer", lambda run: type("Trainer", (), {"step": None}))
    monkeypatch.setattr(step_on_gpu, "ceiling", lambda *_: type("Top", (), {"flops": 1e12}))


def test_steps_that_are_chosen_are_measured_in_order_and_one_failure_is_a_row(steps_without_a_gpu, tmp_path):
    measure = lambda *chosen: list(
        step_on_gpu.measure_on_gpu(methods.METHODS["dino"], methods.LAPTOP, 0.0, chosen, tmp_path)
    )
    assert [row["provider"] for row in measure()] == ["official eager", "patchlight", "c"]
    rows = measure("c", "patchlight")
    assert [row["status"] for row in rows] == ["ok", "failed: KeyError"]
    assert rows[0]["images_per_s"] == pytest.approx(1600)
    kernels = json.loads((tmp_path / "profile_DINO_vit_tiny_16_B16_drop_path_0_c.json").read_text())
    assert list(kernels.items()) == [("b", [1, 90.0]), ("a<kernel>", [2, 9.0])]
    step.print_gpu_rows(rows[1:])
    case = predicted.CASE.fullmatch(rows[0]["case"])
    assert case.groupdict() == {"title": "DINO", "arch": "vit_tiny", "batch": "16", "drop_path": "0"}


def test_predictions_stand_beside_what_was_measured(tmp_path):
    providers = ("patchlight", "official eager", "patchlight launched", "official compiled + SDPA")
    write_rows(
        ({"provider": name, "status": "ok"} for name in providers), tmp_path / "step_a.csv", ("provider", "status")
    )
    chosen = [row["provider"] for row in predicted.chosen_rows(tmp_path, compiled=False)]
    assert chosen == ["patchlight launched", "official eager"]
    assert len(list(predicted.chosen_rows(tmp_path, compiled=True))) == 3
    row = {"case": "DINO", "provider": "patchlight", "launches": "100", "launches predicted": 110}
    page = "\n".join(predicted.page([row | {"device_ms": "50", "device_ms predicted": "40.0"}]))
    assert "| DINO | patchlight | 110, 100 (+10.0%) | 40.0, 50 (-20.0%) |" in page


def test_a_wrong_contestant_is_not_timed():
    from patchlight_kernels import registry

    spec = registry.spec("prototype_ce")
    arguments = spec.inputs(spec.tests[1], torch.float32, "cpu")
    truth = race.results_of(functools.partial(spec.public, products="fp32"), arguments)
    names = dict(race.contestants(("cuda", "triton")))
    assert {"patchlight", "patchlight cuda stream", "patchlight triton chunks 32 MB", race.SMART} <= set(names)
    assert next(iter(names)) == race.OFFICIAL, "where reports expect it"
    assert race.compare(names["patchlight fp16x3"], arguments, truth)["status"] == "ok"
    wrong = race.compare(lambda **given: spec.public(**given) * 1.1, arguments, truth)
    assert wrong["status"] == "wrong result, not timed" and wrong["error"] == pytest.approx(0.1, rel=0.1)


def test_a_failing_case_does_not_end_a_slice(tmp_path, monkeypatch, capsys):
    def measured(spec, case, dtype, device, seconds):
        if spec.name == "adamw":
            raise ValueError("no adamw here")
        shared = {"op": spec.name, "case": str(case), "mode": "fwd", "provider": "patchlight cpp"}
        return [shared | {"status": "ok", "median_ms": 1.0}]

    monkeypatch.setattr(ops_slice, "measure_case", measured)
    monkeypatch.setattr(ops_slice, "PEERS", {})
    with pytest.raises(SystemExit, match="adamw vit-small failed: no adamw here"):
        ops_slice.main(("adamw:vit-small", "square_sums:vit-small"), tmp_path / "ops.csv")
    assert [row["op"] for row in csv.DictReader((tmp_path / "ops.csv").open())] == ["square_sums"]
    with pytest.raises(SystemExit, match="cases must be of the op suite, got adamw:none; choose among"):
        ops_slice.find_cases(["adamw:none"])


def test_peers_that_compile_or_are_slow_are_left_out(monkeypatch):
    table = lambda: {"photometric": {"torchvision per sample": 1, "batched eager": 2, "compile(batched)": 3}}
    for compiled, kept in ((False, ["batched eager"]), (True, ["compile(batched)"])):
        monkeypatch.setattr(ops_slice, "PEERS", table())
        ops_slice.leave_out(compiled)
        assert list(ops_slice.PEERS["photometric"]) == kept


def test_what_was_carried_is_unpacked_once_it_is_complete(tmp_path):
    """DALI's archive in two parts, which come in two calls."""
    (tmp_path / "carry").mkdir()
    (tmp_path / "module.py").write_text("x = 1\n" * 10_000)
    with tarfile.open(tmp_path / "dali.tar.xz", "w:xz") as file:
        file.add(tmp_path / "module.py", "module.py")
    packed = (tmp_path / "dali.tar.xz").read_bytes()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" from "$PYTHONPATH"\n')
    python.chmod(0o755)
    environment = os.environ | {name: str(tmp_path / name.lower()) for name in ("CARRY", "SITE", "PYTHON")}
    said = []
    for name, content in (("aa", packed[:100]), ("ab", packed[100:]), ("ab", packed[100:])):
        for old in (tmp_path / "carry").iterdir():
            old.unlink()
        (tmp_path / f"carry/dali.part.{name}").write_bytes(content)
        command = ["bash", ROOT / "bench/rented.sh", "--minutes", "8"]
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert said[0].startswith("rented: DALI's parts are not complete yet\n")
    assert all(text.splitlines()[-1].startswith(f"-m bench gpu --minutes 8 from {tmp_path}/site:") for text in said)
    assert len(said[1].splitlines()) == len(said[2].splitlines()) == 1
    assert (tmp_path / "site/module.py").read_text() == (tmp_path / "module.py").read_text()


def test_what_was_measured_can_be_published(tmp_path):
    where = {"hardware": "a GPU", "threads": "16", "torch": "2", "triton": "3", "commit": "c", "date": "d"}
    row = where | {"op": "step", "case": "DINO B64", "dtype": "bf16", "mode": "train", "status": "ok", "mfu": 0.5}
    row |= {"device_ms": 9.0, "launches": 2, "peak_gib": 4.0, "p20_ms": 9.0, "p80_ms": 41.0}
    providers = {"patchlight": 10.0, "official eager": 40.0, "patchlight launched": 20.0}
    for name, case, failed in (("step_dino", "DINO B64", "none"), ("step_ibot", "iBOT B64", "patchlight")):
        rows = [
            row | {"case": case, "provider": p, "median_ms": ms, "images_per_s": 64e3 / ms}
            | ({"status": "failed: no", "median_ms": ""} if p == failed else {})
            for p, ms in providers.items()
        ]  # fmt: skip
        write_rows(rows, tmp_path / f"hour/{name}.csv", step.GPU_COLUMNS)
    op = where | {"op": "adamw", "case": "vit", "dtype": "float32", "mode": "fwd", "status": "ok", "peak_extra_mb": 1.0}
    write_rows([op | {"provider": "patchlight cuda", "median_ms": 1.0}], tmp_path / "hour/ops.csv")
    compiled = ("official eager", 9.0), ("compile(official)", 3.0)
    rows = [op | {"provider": name, "median_ms": ms} for name, ms in compiled]
    write_rows(rows, tmp_path / "hour/ops_compiled_peers.csv")
    publish.main(tmp_path / "hour", "gpu", tmp_path / "results")
    text = tables.all_tables(tmp_path / "results")
    assert "| DINO B64 bf16 | **10 ms** | 6400 | 50% | 9 ms, 2 | 40 ms (4.0x) |  | 20 ms (2.0x) | 4 : 4 GiB |" in text
    assert "| iBOT B64 bf16 | not measured |" in text
    assert "| `adamw` | vit float32 fwd | **1 ms** | 9 ms (9.0x) | compile(official) 3 ms (3.0x) | 1 : 1 MB |" in text
    report.draw(tmp_path / "results/step_gpu.csv", tmp_path / "plots")
    assert (tmp_path / "plots/step.png").exists()


def test_first_losses_are_compared(monkeypatch, capsys):
    tiny = methods.StepSize("vit_tiny", 2, 64, 48, 2, 64, 64, (2, 1), {"width": 48, "depth": 2, "heads": 3})
    assert losses.compare(["dino", "selfpatch"], tiny) == []
    assert "2 methods, largest relative difference" in capsys.readouterr().out
    monkeypatch.setattr(losses, "last_loss", lambda trainer: float("nan"))
    assert losses.compare(["dino"], tiny) == ["dino"]
