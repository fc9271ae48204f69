"""Workers of an evaluation that stand still or die: named with their image, and no evaluation waits for ever."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from parity import SEED

from patchlight.data.stored import Images
from patchlight.evaluation import training
from patchlight.evaluation.images import CenterBatches, CenterCrops, Unreadable, readable
from patchlight.evaluation.training import Batches, training_loader

COUNT = 11


class Pictures(Images):
    """Images whose pixels are their number; `stopped` stops or ends the process that reads it, once."""

    def __init__(self, stopped: int = -1, number: int = signal.SIGSTOP, once=None) -> None:
        self.stopped, self.number, self.once = stopped, number, once

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int) -> str:
        return f"picture-{index}.png"

    def read(self, index: int) -> np.ndarray:
        if index == self.stopped and not self.once.exists():
            self.once.write_text(str(os.getpid()))
            os.kill(os.getpid(), self.number)
        if index == 3:
            raise ValueError("no image")
        return np.full((9, 12, 3), index, np.uint8)


class ForRanks:
    """Of one process."""

    rank, world = 0, 1


def crops(pictures) -> CenterCrops:
    return CenterCrops(pictures, np.random.default_rng(SEED).permutation(COUNT), 8, 8)


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_batches_are_those_of_one_process(workers):
    order = np.random.default_rng(SEED).permutation(COUNT)
    batches = CenterBatches(crops(Pictures()), 4, workers)
    assert len(batches) == 3
    for _ in range(2):  # again from the start
        found = list(batches)
        assert [len(numbers) for _, numbers, _ in found] == [4, 4, 3]
        assert torch.cat([numbers for _, numbers, _ in found]).tolist() == order.tolist()
        pixels = torch.cat([images for images, _, _ in found])
        assert pixels.amax((1, 2, 3)).tolist() == [0 if number == 3 else number for number in order]
        reasons = dict(zip(order.tolist(), [r for _, _, reasons in found for r in reasons], strict=True))
        assert {number for number, reason in reasons.items() if reason} == {3}
        assert reasons[3] == "ValueError: no image"


@pytest.mark.parametrize(
    ("number", "what"), [(signal.SIGSTOP, "has not got on for 2 seconds"), (signal.SIGKILL, "was ended by SIGKILL")]
)
def test_a_stopped_worker_is_named_and_started_anew(number, what, tmp_path):
    pictures, unreadable = Pictures(7, number, tmp_path / "once"), Unreadable()
    batches = CenterBatches(crops(pictures), 4, workers=2, timeout=2.0)
    with pytest.warns(UserWarning, match=rf"evaluation loader: worker \d \(process \d+\) {what} at picture-7\.png"):
        found = [n for _, numbers in readable(batches, pictures, unreadable) for n in numbers.tolist()]
    order = np.random.default_rng(SEED).permutation(COUNT).tolist()
    assert found == [number for number in order if number != 3]
    assert list(unreadable.reasons) == ["picture-3.png"]
    worker = int((tmp_path / "once").read_text())
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < end, "the stopped process was left"
        time.sleep(0.01)


class Changed:
    """Training data."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int) -> str:
        return self.pictures.name(index)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.pictures.read(item)), item


def test_a_worker_of_a_training_that_stands_still_is_an_error_with_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TIMEOUT", 5)
    batches = Batches(COUNT, 2, epochs=2, ranks=ForRanks(), seed=SEED)
    data = Changed(Pictures(list(batches)[1][0], signal.SIGSTOP, tmp_path / "once"))
    loader = training_loader(data, batches, 1, torch.device("cpu"), Unreadable())
    rule = r"A worker must read its batch, got nothing in 5 seconds at (.*) or in the batches after it; look at"
    with pytest.raises(RuntimeError, match=rule) as found:
        list(loader)
    named = [", ".join(f"picture-{item}.png" for item in items) for items in batches]
    assert named.index(re.match(rule, str(found.value))[1]) < 2, "the stopped one, or the one before"
    os.kill(
        int((tmp_path / "once").read_text()), signal.SIGCONT
    )  # and it ends with the loader; torch would report a dead one


def test_batches_of_a_training_are_all_there():
    batches = Batches(COUNT, 2, epochs=2, ranks=ForRanks(), seed=SEED)
    loader = training_loader(Changed(Pictures()), batches, 1, torch.device("cpu"), Unreadable())
    found = [labels.tolist() for _, labels in loader]
    assert len(found) == 10
    assert all(here == there or 3 in there for here, there in zip(found, batches, strict=True))
