"""Threads that wait: they spin while the processors are ours, and sleep while other processes want them.

An operation on a CPU runs on PyTorch's OpenMP threads (libgomp), which spin for milliseconds while they wait for the next
one. On idle processors nothing is faster. Beside one busy process, the spinning uses up a thread's share of its processor,
so that it stands in the queue when there is work to do, and a step takes several times as long. libgomp itself spins 300
times shorter when there are more OpenMP threads than processors. So while others want the processors, a thread here holds a
second team of OpenMP threads, which sleeps. No result depends on it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

CHECK_SECONDS = 1.0
# Seconds per second that all our threads together stood in the queue: alone about 0.01, beside a busy process 0.6.
QUEUED = 0.2
TASKS = Path("/proc/self/task")


@contextlib.contextmanager
def considerate_threads(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block, waiting threads sleep while other processes want the processors; `say` hears of the first time."""
    if not threads_spin():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, say), name="patchlight processors", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def threads_spin() -> bool:
    """Whether there are threads that spin and that nobody has given another habit."""
    chosen = os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    unknown = not list(TASKS.glob("*/schedstat"))  # where the kernel does not count it
    if chosen or torch.cuda.is_available() or torch.get_num_threads() == 1 or unknown:
        return False
    return "libgomp" in Path("/proc/self/maps").read_text()


def _watch(ended: threading.Event, say: Callable[[str], None]) -> None:
    release: threading.Event | None = None
    said, before = False, queued_seconds()
    while not ended.wait(CHECK_SECONDS):
        now = queued_seconds()
        wanted, before = now - before > QUEUED * CHECK_SECONDS, now
        if wanted and release is None:
            release = threading.Event()
            threading.Thread(target=_second_team, args=(release,), name="patchlight team", daemon=True).start()
            if not said:
                say("Other processes want the processors: while they do, waiting threads sleep instead of spinning.")
                said = True
        elif not wanted and release is not None:
            release.set()
            release = None
    if release is not None:
        release.set()


def queued_seconds() -> float:
    """How long all threads of this process have been ready to run, and have not run."""
    total = 0
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9


def _second_team(release: threading.Event) -> None:
    torch.zeros(1 << 20).add_(1)  # large enough for all threads: now this one has a team
    release.wait()
