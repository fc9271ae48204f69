"""TensorBoard's file of a run: the numbers of its log lines."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from .log_file import append

_numbers = itertools.count()  # so that no two files of a process have the same name


class EventFile:
    """A file of TensorBoard's events that is written like every other file of a run, without a thread that may die."""

    def __init__(self, folder: Path, start: int) -> None:
        """start: the step at which this process began; TensorBoard leaves out what earlier ones wrote of later steps."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path, self.start = folder / name, start

    def write(self, records: list[tuple[float, Mapping[str, float]]]) -> None:
        """Appends log lines, each with the time at which it came."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            began = records[0][0]
            restart = SessionLog(status=SessionLog.START)
            events += [Event(wall_time=began, file_version="brain.Event:2")]
            events += [Event(wall_time=began, step=self.start + 1, session_log=restart)]
        for seconds, record in records:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items()]
            events.append(Event(wall_time=seconds, step=int(record["step"]), summary=Summary(value=values)))
        append(self.path, b"".join(framed(event) for event in events))


def framed(event) -> bytes:
    """An event with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
