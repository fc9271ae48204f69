"""Shorter waiting of CPU threads while other processes need the processors. No result depends on it.

An operation on a CPU runs on PyTorch's OpenMP threads (libgomp), which spin for milliseconds while they wait for the next
one. On idle processors nothing is faster. Beside a busy process, a spinning thread uses up its share of the processor, so
it is queued when there is work to do, and a step takes several times as long. libgomp itself spins 300 times shorter when
there are more OpenMP threads than processors. So while other processes need the processors, a thread here keeps a second
team of OpenMP threads, which sleeps.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

CHECK_SECONDS = 1.0
# Seconds per second that all threads of this process together are queued: alone about 0.01, beside a busy process 0.6.
MAX_QUEUED = 0.2
TASKS = Path("/proc/self/task")


@contextlib.contextmanager
def limit_spinning(report: Callable[[str], None]) -> Iterator[None]:
    """Within the block, waiting threads sleep while other processes need the processors; the first time is reported."""
    if not threads_spin():
        yield
        return
    ended = threading.Event()
    monitor = threading.Thread(target=_monitor, args=(ended, report), name="patchlight processors", daemon=True)
    monitor.start()
    try:
        yield
    finally:
        ended.set()
        monitor.join()


def threads_spin() -> bool:
    """Whether there are threads that spin while they wait, and the user has not configured how they wait."""
    configured = os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    unknown = not list(TASKS.glob("*/schedstat"))  # the kernel does not count queued time
    if configured or torch.cuda.is_available() or torch.get_num_threads() == 1 or unknown:
        return False
    return "libgomp" in Path("/proc/self/maps").read_text()


def _monitor(ended: threading.Event, report: Callable[[str], None]) -> None:
    """Starts and ends the second team, as other processes come and go."""
    release: threading.Event | None = None
    reported, before = False, queued_seconds()
    while not ended.wait(CHECK_SECONDS):
        now = queued_seconds()
        needed, before = now - before > MAX_QUEUED * CHECK_SECONDS, now
        if needed and release is None:
            release = threading.Event()
            threading.Thread(target=_second_team, args=(release,), name="patchlight team", daemon=True).start()
            if not reported:
                report("Other processes need the processors: while they do, waiting threads sleep instead of spinning.")
                reported = True
        elif not needed and release is not None:
            release.set()
            release = None
    if release is not None:
        release.set()


def queued_seconds() -> float:
    """How long all threads of this process together were ready to run but did not run."""
    total = 0
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # the thread has ended in the meantime
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9


def _second_team(release: threading.Event) -> None:
    torch.zeros(1 << 20).add_(1)  # large enough for all threads: from here on this thread has a team
    release.wait()
