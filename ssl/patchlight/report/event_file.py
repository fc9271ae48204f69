"""TensorBoard's file of a run: the numbers of its log lines and looks, and pictures."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from pathlib import Path

from .entry import Entry
from .log_file import append

_numbers = itertools.count()  # so that no two files of a process have the same name


class EventFile:
    """A file of TensorBoard's events that is written like every other file of a run, without a thread that may die."""

    def __init__(self, folder: Path, start: int) -> None:
        """start: the step at which this process began; TensorBoard leaves out what earlier ones wrote of later steps."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path, self.start = folder / name, start

    def write(self, entries: list[Entry]) -> None:
        """Appends numbers and pictures, each with the time at which it came."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            began = entries[0].seconds
            restart = SessionLog(status=SessionLog.START)
            events += [Event(wall_time=began, file_version="brain.Event:2")]
            events += [Event(wall_time=began, step=self.start + 1, session_log=restart)]
        for entry in entries:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.numbers.items()]
            for name, data in entry.pictures.items():
                width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # as PNG has them
                image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
                values.append(Summary.Value(tag=name, image=image))
            events.append(Event(wall_time=entry.seconds, step=entry.step, summary=Summary(value=values)))
        append(self.path, b"".join(framed(event) for event in events))


def framed(event) -> bytes:
    """An event with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
