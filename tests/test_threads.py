"""Waiting threads: when they are monitored, and what happens when other processes need the processors."""

import threading
import time

import pytest
import torch

from patchlight import threads


@pytest.fixture
def two_threads(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(2)  # the fixture of all tests sets it back


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def soon(condition) -> bool:
    """Whether it becomes true within a minute."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_second_team_exists_while_others_need_the_processors(two_threads, monkeypatch):
    if not threads.threads_spin():
        pytest.skip("this torch has another OpenMP than libgomp, or the system does not count queued time")
    queued, rate, reports = [0.0], [0.0], []

    def next_value() -> float:
        queued[0] += rate[0]
        return queued[0]

    monkeypatch.setattr(threads, "queued_seconds", next_value)
    monkeypatch.setattr(threads, "CHECK_SECONDS", 0.01)
    with threads.limit_spinning(reports.append):
        assert "patchlight processors" in names()
        assert "patchlight team" not in names()
        for _ in range(2):
            rate[0] = 0.008
            assert soon(lambda: "patchlight team" in names())
            rate[0] = 0.0
            assert soon(lambda: "patchlight team" not in names())
    assert len(reports) == 1, "the first time only"
    assert "sleep instead of spinning" in reports[0]
    assert "patchlight processors" not in names()


def test_nothing_is_monitored_where_nothing_spins(two_threads, monkeypatch):
    def monitored() -> bool:
        with threads.limit_spinning(lambda sentence: None):
            return "patchlight processors" in names()

    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert not monitored(), "the user has configured it"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    torch.set_num_threads(1)
    assert not monitored(), "no thread waits"
    torch.set_num_threads(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not monitored(), "with a GPU the threads only launch kernels"


def test_queueing_time_of_all_threads(tmp_path, monkeypatch):
    """The second number of each thread's file, in nanoseconds; a thread without one has ended in the meantime."""
    for task, line in (("11", "7 1500000000 3"), ("12", "9 250000000 1"), ("13", None)):
        (tmp_path / task).mkdir()
        if line:
            (tmp_path / task / "schedstat").write_text(line)
    monkeypatch.setattr(threads, "TASKS", tmp_path)
    assert threads.queued_seconds() == 1.75
