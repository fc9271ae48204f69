"""The probe's files in a run's folder: rewound with the run, and never the end of it."""

import numpy as np
import pytest
import torch
from engine.tiny_run import tiny_run, tiny_trainer
from PIL import Image

from patchlight.data.procedural import ProceduralSource
from patchlight.data.stored import Subset
from patchlight.engine.parallel import Mesh
from patchlight.engine.probe import TeacherProbe
from patchlight.records import Clock
from patchlight.report.log_file import append, read_lines, to_bytes

ALONE = Mesh(torch.device("cpu"))


def clock(step: int) -> Clock:
    return Clock(step, 20, 8 * step, 5)


def probe(folder) -> TeacherProbe:
    return TeacherProbe(tiny_run(folder), ProceduralSource(40, size=16), ALONE)


def steps(folder) -> list[int]:
    return [line["step"] for line in read_lines(folder / "knn.jsonl")]


def test_results_of_later_steps_are_removed_and_those_of_the_untrained_teacher_kept(tmp_path):
    for step in (0, 5, 10, 15):
        append(tmp_path / "knn.jsonl", to_bytes({"step": step, "k10": step / 20, "k20": 0.5}))
    assert probe(tmp_path).rewind(clock(10)) == {"k10": 0.0, "k20": 0.5}
    assert steps(tmp_path) == [0, 5, 10]


def test_a_look_takes_no_random_numbers_from_the_training(tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path))
    before = torch.get_rng_state()
    accuracies = probe(tmp_path).evaluate(trainer.teacher, trainer.clock)
    assert accuracies
    assert torch.equal(torch.get_rng_state(), before)


def test_whole_images_are_read_once_and_in_order(tmp_path):
    source = ProceduralSource(70, size=16)
    looks = TeacherProbe(tiny_run(tmp_path), source, ALONE)
    batches = list(looks._batches(Subset(source, np.arange(70))))
    assert torch.cat([numbers for _, numbers in batches]).tolist() == list(range(70))
    pixels = np.concatenate([looks._unnormalized(pixels) for pixels, _ in batches])
    assert (pixels == source.images).all()


def test_a_start_from_nothing_removes_all_results(tmp_path):
    """As after a crash before the first checkpoint: the run evaluates the untrained teacher again."""
    for step in (0, 5):
        append(tmp_path / "knn.jsonl", to_bytes({"step": step, "k10": 0.5}))
    assert probe(tmp_path).rewind(clock(0)) == {}
    assert steps(tmp_path) == []
    assert probe(tmp_path / "none").rewind(clock(0)) == {}


def test_a_torn_line_does_not_block_a_resumed_run(tmp_path, capsys):
    append(tmp_path / "knn.jsonl", to_bytes({"step": 0, "k10": 0.25, "k20": None}))
    append(tmp_path / "knn.jsonl", b'{"step": 5, "k1\0\0')
    assert probe(tmp_path).rewind(clock(5)) == {"k10": 0.25}
    assert "line 2 (17 bytes) was damaged, and kept in knn.jsonl.damaged" in capsys.readouterr().out
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize("place", ["knn.jsonl", "plots"])
def test_a_run_goes_on_where_results_and_pictures_cannot_be_written(tmp_path, capsys, place):
    trainer, looks = tiny_trainer(tiny_run(tmp_path)), probe(tmp_path)
    obstacle = tmp_path / place
    if place == "plots":
        obstacle.write_text("a file, where a folder should be")
    else:
        obstacle.mkdir()
    for step in (0, 5):
        assert looks.evaluate(trainer.teacher, clock(step)).keys() == {"k10", "k20"}
    printed = capsys.readouterr().out
    assert printed.count(f"A run must be able to write {place}, got ") == 1
    obstacle.unlink() if obstacle.is_file() else obstacle.rmdir()
    looks.close()
    assert steps(tmp_path) == [0, 5]
    for step in (0, 5):
        with Image.open(tmp_path / "plots" / f"attention-{step:07d}.png") as picture:
            picture.load()
    assert "could be written again" in capsys.readouterr().out
