"""Worker processes that die, stand still or are forgotten: named, started anew, and the stream stays the same."""

import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from data.pictures import Pictures

from patchlight.data.loaders import dali_is_there
from patchlight.data.policy import dino_policy
from patchlight.data.torchvision_loader import TorchvisionLoader

POLICY = dino_policy(2, 24, 12)


@pytest.fixture
def build():
    built = []

    def build(source, batch: int = 5, **options) -> TorchvisionLoader:
        built.append(TorchvisionLoader(source, POLICY, batch, **options))
        return built[-1]

    yield build
    for loader in built:
        loader.close()


def tensors(loader, count: int) -> list[torch.Tensor]:
    return [tensor for _ in range(count) for tensor in next(loader).tensors()]


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Slow(Pictures):
    """Reading an image takes a while."""

    seconds = 0.25

    def read(self, index):
        time.sleep(self.seconds)
        return super().read(index)


class Deadly(Pictures):
    """Image 7 ends the process that reads it, as happens where it needs too much memory."""

    def read(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


class Processes(Pictures):
    """Tells which processes read: each appends its number to a file."""

    def __init__(self, count: int, path) -> None:
        super().__init__(count)
        self.path = path

    def read(self, index):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")
        return super().read(index)

    def readers(self) -> set[int]:
        return {int(line) for line in self.path.read_text().split()}


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "has not got on for 2 seconds")]
)
def test_a_worker_that_dies_or_stops_is_replaced_and_named(build, tmp_path, number, reason):
    whole = tensors(build(Pictures(31)), 14)
    source = Processes(31, tmp_path / "readers")
    loader = build(source, workers=2, timeout=2.0)
    before = tensors(loader, 4)
    readers = source.readers()
    assert len(readers) == 2
    for process in readers:
        os.kill(process, number)
    with pytest.warns(UserWarning, match="is started anew and reads the same batch again") as warned:
        after = tensors(loader, 10)
    assert_same(before + after, whole)
    sentences = [str(w.message) for w in warned]
    for process in readers:
        assert any(f"(process {process}) {reason} at picture " in s for s in sentences), sentences
    assert all(any(f"worker {worker} " in s for s in sentences) for worker in range(2)), sentences
    assert not readers & set(running(readers)), "the old ones are gone"


def running(processes) -> list[int]:
    """Which of the processes exist."""
    found = []
    for process in processes:
        try:
            os.kill(process, 0)
            found.append(process)
        except ProcessLookupError:
            pass
    return found


def test_a_worker_that_dies_at_the_same_image_again_and_again_is_an_error(build):
    loader = build(Deadly(12), batch=12, workers=1)
    with pytest.warns(UserWarning, match=r"was ended by SIGKILL at picture 7; it is started anew") as warned:
        with pytest.raises(
            RuntimeError, match=r"in 4 attempts, got the last one: worker 0 .* SIGKILL at picture 7; look"
        ):
            next(loader)
    assert len(warned) == 3


def test_a_slow_worker_is_waited_for(build):
    """A batch takes 2.5 seconds, an image a quarter."""
    loader = build(Slow(10), batch=10, workers=1, timeout=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views = next(loader)
    assert len(views.ids) == 10


def test_signals_for_the_training_process_do_not_end_its_workers(build, tmp_path):
    """Schedulers and terminals send these to all processes, and training then ends in order."""
    source = Processes(31, tmp_path / "readers")
    loader = build(source, workers=2)
    before = tensors(loader, 1)
    for process in source.readers():
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(before + tensors(loader, 8), tensors(build(Pictures(31)), 9))


def test_an_error_in_a_worker_keeps_its_type_and_the_position(build):
    loader = build(Pictures(20, bad=tuple(range(20))), workers=2, most_bad=1.0)
    for _ in range(2):
        with pytest.raises(OSError, match="must be readable, got none for picture"):
            next(loader)
    assert loader.state_dict()["samples"] == 0


def test_a_forgotten_loader_ends_its_workers(tmp_path):
    source = Processes(31, tmp_path / "readers")
    loader = TorchvisionLoader(source, POLICY, 5, workers=2)
    next(loader)
    handles = [os.pidfd_open(process) for process in source.readers()]
    del loader
    gc.collect()
    assert all_end(handles)


def all_end(handles: list[int], seconds: float = 60) -> bool:
    """Whether processes end in time."""
    ended = [bool(select.select([handle], [], [], seconds)[0]) for handle in handles]
    for handle in handles:
        os.close(handle)
    return all(ended)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from data.test_workers import POLICY, Processes
from patchlight.data.torchvision_loader import TorchvisionLoader
source = Processes(31, Path(sys.argv[1]))
loader = TorchvisionLoader(source, POLICY, 5, workers=2)
for _ in range(2):
    next(loader)
os.kill(max(source.readers()), signal.SIGSTOP)
print(*source.readers(), flush=True)
sys.stdin.read()
"""


def test_workers_end_with_the_training_process(tmp_path):
    """Also one that is stopped, and although the training process has no time to end them."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "readers")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as training:
        readers = [int(word) for word in training.stdout.readline().split()]
        handles = [os.pidfd_open(process) for process in readers]
        training.kill()
    assert len(readers) == 2
    assert all_end(handles)


def test_few_decoded_images_are_in_memory_at_a_time(build):
    class Large(Pictures):
        """Images of 27 MB each."""

        alive = most = 0

        def read(self, index):
            image = np.zeros((3000, 3000, 3), np.uint8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(image, self.forget)
            return image

        def forget(self):
            self.alive -= 1

    source = Large(6)
    next(build(source, batch=6))
    assert source.most == 1


@pytest.mark.skipif(not dali_is_there(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_read_of_the_dali_loader_that_never_ends_is_named(workers):
    from patchlight.data.dali_loader import DaliLoader

    released = threading.Event()

    class Hanging(Pictures):
        def encoded(self, index):
            if index == 7:
                released.wait()
            return super().encoded(index)

    loader = DaliLoader(Hanging(12), POLICY, 6, workers=workers, timeout=2.0)
    with pytest.raises(TimeoutError, match="must get on by an image, got none for 2 seconds at picture 7; look"):
        next(loader), next(loader)
    released.set()
    whole = DaliLoader(Pictures(12), POLICY, 6)
    whole.load_state_dict(loader.state_dict())
    assert_same(tensors(loader, 3), tensors(whole, 3))
    loader.close()
    whole.close()
