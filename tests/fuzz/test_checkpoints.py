"""Random damage to checkpoints: `verify` sees all of it, and a resume takes the newest whole one, bit for bit."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine.tiny_run import tiny_run, tiny_trainer
from faults.checkpoints import in_time, verify
from faults.child import fingerprint
from faults.damage import DAMAGES
from fuzz.rounds import fuzz

from patchlight.checkpoint.folder import complete

STEPS = (1, 2, 3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run's folder with three checkpoints, and its states by step."""
    folder, states = tmp_path_factory.mktemp("written"), {}
    trainer = tiny_trainer(tiny_run(folder))
    for step in STEPS:
        trainer.step()
        trainer.save()
        states[step] = fingerprint(trainer)
    return folder, states


def damage(rng: np.random.Generator, checkpoints: Path) -> None:
    """Damages up to all checkpoints, each up to three times."""
    for path in complete(checkpoints)[-int(rng.integers(1, len(STEPS) + 1)) :]:
        for _ in range(rng.integers(1, 4)):
            # An earlier damage may have left nothing to work on.
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError, TypeError):
                DAMAGES[str(rng.choice(list(DAMAGES)))](rng, path)


def contents(path: Path) -> dict[str, bytes | str]:
    """The bytes of files; what else there is by its kind."""
    return {
        file.name: file.read_bytes() if file.is_file() and not file.is_symlink() else oct(file.lstat().st_mode)
        for file in path.iterdir()
    }


def test_damage_is_seen_and_never_loaded(written, tmp_path, capsys):
    folder, states = written

    def attempt(rng: np.random.Generator) -> None:
        run_folder = tmp_path / str(rng.integers(10**12))
        shutil.copytree(folder, run_folder)
        checkpoints = run_folder / "checkpoints"
        original = {step: contents(checkpoints / f"step-{step:08d}") for step in STEPS}
        damage(rng, checkpoints)
        broken = {step for step in STEPS if contents(checkpoints / f"step-{step:08d}") != original[step]}
        assert {step for step in STEPS if verify(checkpoints / f"step-{step:08d}")} == broken
        run = tiny_run(run_folder)
        trainer = tiny_trainer(replace(run, output=replace(run.output, resume=True)))
        if broken == set(STEPS):
            with in_time(), pytest.raises(ValueError, match=r"must have one, got only .*; copy an intact one there"):
                trainer.begin()
        else:
            with in_time():
                trainer.begin()
            assert trainer.clock.step == max(set(STEPS) - broken)
            assert fingerprint(trainer) == states[trainer.clock.step]
        shutil.rmtree(run_folder)

    fuzz(attempt, at_least=5)
