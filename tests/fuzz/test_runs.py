"""Any values of the fields of a run: a run whose rates are numbers, or one sentence that names what is wrong."""

import json
import math
import re
from dataclasses import fields, replace

import numpy as np
from fuzz.rounds import fuzz

from patchlight.engine.schedules import rates_at
from patchlight.evaluation.davis.benchmark import DavisProtocol
from patchlight.evaluation.davis.propagation import PropagationProtocol
from patchlight.objectives import OBJECTIVES
from patchlight.records import Clock, NeighborRule
from patchlight.run import Model, Objectives, Optim, Output, Parallel, Run, Schedule

WHOLE = (0, 1, -1, 2, 3, 16, 224, 1000, 2**31, 2**53, 2**63, -(2**70), 10**400)
REAL = (0.0, -0.0, 1.0, -1.0, 0.5, 0.996, math.nan, math.inf, -math.inf, 1e-320, 5e-324, 1e15, 1e308, -1e-9, 3, 10**400)
WORDS = ("", "x", "cls", "mean", "adamw", "auto", "fp32", "a\0b\n", "é" * 300, "../..", "centering", "step", "learned")
NAMES = ("width", "heads", "dino/cls", "a\nb")
FORM = r"[^\n]+, got [^\n]+; [^\n]+\."
OPTIONS = tuple(OBJECTIVES.values())


def any_value(kind: str, rng: np.random.Generator) -> object:
    """A value of a field's type, usual or not."""
    pick = [lambda: WHOLE[rng.integers(len(WHOLE))], lambda: int(rng.integers(-3, 4)), lambda: int(rng.integers(1, 64))]
    real = [lambda: REAL[rng.integers(len(REAL))], lambda: float(10 ** rng.uniform(-9, 4)), lambda: float(rng.random())]
    if "None" in kind and rng.random() < 0.3:
        return None
    if kind.startswith("dict"):
        values = pick if "int" in kind else real
        return {NAMES[rng.integers(len(NAMES))]: values[rng.integers(3)]() for _ in range(rng.integers(3))}
    if kind.startswith("tuple[float"):
        return tuple(real[rng.integers(3)]() for _ in range(rng.integers(1, 4)))
    if kind.startswith("NeighborRule"):
        return NeighborRule(any_value("int | None", rng), any_value("int", rng))
    if kind.startswith("bool"):
        return bool(rng.integers(2))
    if kind.startswith("int"):
        return pick[rng.integers(3)]()
    if kind.startswith("float"):
        return real[rng.integers(3)]()
    return WORDS[rng.integers(len(WORDS))] if kind.startswith("str") else None


def attempt(kind: type, rng: np.random.Generator, **given) -> object:
    """The part with some fields at any value; its defaults where a complaint came instead."""
    fuzzed = [field for field in fields(kind) if not str(field.type)[0].isupper() or "NeighborRule" in str(field.type)]
    fuzzed = [field for field in fuzzed if not str(field.type).startswith("tuple[Obj")]
    chosen = rng.permutation(len(fuzzed))[: rng.integers(0, 4)]
    values = {fuzzed[i].name: any_value(str(fuzzed[i].type), rng) for i in chosen}
    built, said = build(kind, **given, **values)
    assert built is not None or re.fullmatch(FORM, said), f"{kind.__name__}({values}): {said}"
    return kind(**given) if built is None else built


def build(kind: type, **values) -> tuple[object, str]:
    """What it gives, or what it says against the values."""
    try:
        return kind(**values), ""
    except ValueError as error:
        return None, str(error)


def test_any_values_give_a_run_or_a_sentence():
    built = []

    def attempt_run(rng):
        for kind in (*OPTIONS, PropagationProtocol, DavisProtocol):
            attempt(kind, rng)
        options = (attempt(OPTIONS[rng.integers(len(OPTIONS))], rng),)
        parts = {"model": attempt(Model, rng), "optim": attempt(Optim, rng), "schedule": attempt(Schedule, rng)}
        parts |= {"parallel": attempt(Parallel, rng), "output": attempt(Output, rng)}
        objectives = attempt(Objectives, rng, options=options)
        run, said = build(Run, objectives=objectives, **parts)
        if run is None:
            assert re.fullmatch(FORM, said), said
            return
        built.append(run)
        assert replace(run) == run
        plain = run.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)).keys() == plain.keys()
        steps = run.schedule.steps_per_epoch or 100
        batch = run.global_batch(int(rng.integers(1, 9)))
        step = int(rng.integers(0, min(run.schedule.epochs * steps, 2**60)))
        rates = rates_at(Clock(step, run.schedule.epochs * steps, step * batch, steps), run.optim, batch)
        assert all(math.isfinite(rate) and rate >= 0 for rate in rates.values()), rates
        assert rates["momentum"] <= 1
        assert all(re.fullmatch(r"[^\n]+\.", doubt) for doubt in run.optim.doubts(batch))

    count = fuzz(attempt_run)
    assert len(built) > count // 20, "most runs are refused: nothing else is tested"
