"""Writes the page of a run beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..durable import write_whole
from .outlet import Outlet
from .page import build_report
from .run_folder import REPORT_FILE
from .run_summary import RunSummary

PAGE_SECONDS, MOST_PAGE_SECONDS = 20.0, 600.0  # between two pages, which take a hundredth of the time if they can


class PageWriter:
    """Writes the page in a thread of its own, one page at a time. What fails is said, and the next page is another attempt."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.summary = folder, RunSummary(folder)
        self.outlet: Outlet[None] = Outlet(REPORT_FILE, lambda _: self._write(), say)
        self.thread: threading.Thread | None = None
        self.next_page = 0.0
        self.closing = threading.Event()

    def request(self) -> None:
        """Starts to write a page, unless one is being written or was written recently."""
        if time.perf_counter() < self.next_page or (self.thread is not None and self.thread.is_alive()):
            return
        self.thread = threading.Thread(target=self._attempt, name="patchlight report", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Writes the last page, after one that is being written."""
        self.closing.set()
        if self.thread is not None:
            self.thread.join()
        self._attempt()
        self.outlet.close()

    def _attempt(self) -> None:
        began = time.perf_counter()
        if self.outlet.waiting:
            self.outlet.flush()
        else:
            self.outlet.put(None)
        ended = time.perf_counter()
        self.next_page = ended + min(max(PAGE_SECONDS, 100 * (ended - began)), MOST_PAGE_SECONDS)

    def _write(self) -> None:
        write_whole(self.folder / REPORT_FILE, build_report(self.summary.update(self._pause)))

    def _pause(self) -> None:
        """While a resumed run reads its earlier lines, the training has most of the time."""
        self.closing.wait(0.05)
