"""Weights & Biases: entries of a run go to a process of their own, and whatever becomes of it, training goes on at its pace."""

from __future__ import annotations

import base64
import json
import os
import queue
import secrets
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..durable import write_whole
from . import wandb_process
from .console import print_sentence
from .entry import Entry
from .outlet import Outlet
from .run_folder import RUN_FILE, WANDB_ID_FILE, read_json

MOST_WAITING = 1000
ANSWER_SECONDS = 120.0  # W&B itself tries to reach its server for 90 seconds
RESTART_SECONDS = 300.0  # between two starts of the process


class WandbTracker:
    """Takes entries at once; a thread sends them. At most MOST_WAITING wait, then the oldest are dropped."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = Path(folder), say
        self.outlet: Outlet[Entry] = Outlet("wandb", self._write, say, most=MOST_WAITING)
        self.arrived: queue.Queue[Entry | None] = queue.Queue(MOST_WAITING)
        self.dropped = 0
        self.process: subprocess.Popen | None = None
        self.failure: Exception | None = None  # of the last process
        self.next_start = 0.0
        self.thread = threading.Thread(target=self._run, name="patchlight wandb", daemon=True)
        self.thread.start()

    def put(self, entry: Entry | None) -> None:
        """Takes an entry, and does not wait."""
        while True:
            try:
                return self.arrived.put_nowait(entry)
            except queue.Full:
                self._drop()

    def close(self) -> None:
        """Waits a bounded time until all is sent."""
        self.put(None)
        self.thread.join(wandb_process.FINISH_SECONDS)
        if self.thread.is_alive():
            self.say(
                f"wandb has not ended after {wandb_process.FINISH_SECONDS:g} seconds: the run does not wait for it."
            )
            self._kill()
            self.thread.join(10)
        if self.dropped:
            self.say(f"wandb was slower than the run: {self.dropped} entries were dropped.")

    def _drop(self) -> None:
        try:
            self.arrived.get_nowait()
        except queue.Empty:  # the thread was faster
            return
        self.dropped += 1
        if self.dropped == 1:
            self.say(f"{MOST_WAITING} entries wait for wandb: from now on the oldest are dropped.")

    def _run(self) -> None:
        while (entry := self.arrived.get()) is not None:
            self.outlet.put(entry)
        self.outlet.close()
        if self.process is not None:
            self.outlet.attempt(self._end)

    def _write(self, entries: list[Entry]) -> None:
        """Sends entries one by one. After a failure the process is started anew, later."""
        try:
            if self.process is None:
                if self.failure is not None and time.monotonic() < self.next_start:
                    raise self.failure
                self._start()
            for entry in entries:
                self._ask(_message(entry), ANSWER_SECONDS)
        except Exception as error:
            self.failure = error
            self._kill()
            raise

    def _start(self) -> None:
        self.next_start = time.monotonic() + RESTART_SECONDS
        self.process = subprocess.Popen(
            [sys.executable, "-P", wandb_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(self.folder),
            bufsize=0,
            start_new_session=True,  # so that Ctrl-C is for the training
        )
        os.set_blocking(self.process.stdin.fileno(), False)  # type: ignore[union-attr]  # a pipe
        found = self._ask({"config": read_json(self.folder / RUN_FILE)}, ANSWER_SECONDS)
        if self.failure is None:
            place = (
                f"offline; `wandb sync {shlex.quote(found['folder'])}` sends it" if found["offline"] else found["url"]
            )
            print_sentence(f"Weights & Biases: {place}")

    def _ask(self, message: dict, seconds: float) -> dict[str, Any]:
        """Sends a message and waits for its answer."""
        process = self.process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("its process was ended")
        late = TimeoutError(f"no answer in {seconds:g} seconds")
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            if not select.select([], [process.stdin], [], seconds)[1]:
                raise late
            try:
                rest = rest[os.write(process.stdin.fileno(), rest) :]
            except OSError:
                return _ended(process)
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise late
        line = process.stdout.readline()
        if not line:
            return _ended(process)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _end(self) -> None:
        """Ends the process after its last entry."""
        try:
            self._ask({"end": True}, wandb_process.FINISH_SECONDS)
        finally:
            self._kill()

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except OSError:  # it held what could not be sent
                    pass


def environment(folder: Path) -> dict[str, str]:
    """The environment for W&B: the user's own, and where that says nothing, a place and a name that follow from the folder."""
    file = folder / WANDB_ID_FILE
    if not file.exists():
        write_whole(file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    defaults = {
        "WANDB_PROJECT": "patchlight",
        "WANDB_NAME": folder.resolve().name,
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": file.read_text().strip(),
        "WANDB_RESUME": "allow",
        "WANDB_CONSOLE": "off",
        "WANDB_SILENT": "true",
        "WANDB__STATS_PID": str(os.getpid()),  # whose processor and memory are drawn
    }
    return defaults | os.environ


def _message(entry: Entry) -> dict:
    pictures = {name: base64.b64encode(data).decode() for name, data in entry.pictures.items()}
    return {
        "step": entry.step,
        "numbers": dict(entry.numbers),
        "pictures": pictures,
        "name": entry.name,
        "sentence": entry.sentence,
    }


def _ended(process: subprocess.Popen) -> Any:
    raise RuntimeError(f"its process ended with code {process.wait(10)}")
