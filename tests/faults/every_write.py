"""Changes files in every way that Python has, and records it; with one argument, is killed before the third change."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.file_operations import Count, Record, watch

folder = Path(sys.argv[1])
folder.mkdir()

if len(sys.argv) == 2:
    watch(folder, Count(3, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
    for number in range(5):
        (folder / f"{number}").touch()

watch(folder, Record(Path(sys.argv[2])))
(folder / "text.txt").write_text("text")
(folder / "bytes").write_bytes(bytes(range(256)) * 100)
with (folder / "text.txt").open("a") as file:
    file.write(" and more")
with (folder / "bytes").open("r+b") as file:
    file.seek(100)
    file.write(b"in between")
    file.truncate(20_000)
(folder / "inside" / "deep").mkdir(parents=True)
descriptor = os.open(folder / "inside/file", os.O_WRONLY | os.O_CREAT)
os.write(descriptor, b"0123456789")
os.ftruncate(descriptor, 7)
os.pwrite(descriptor, b"ab", 2)
os.fsync(descriptor)
os.close(descriptor)
os.truncate(folder / "inside/file", 5)
(folder / "inside/file").rename(folder / "inside/renamed")
os.link(folder / "inside/renamed", folder / "linked")
(folder / "inside/deep/gone").write_text("gone")
(folder / "inside/deep/gone").unlink()
(folder / "inside/deep").rmdir()
(folder / "text.txt").write_text("new")
(folder.parent / "outside").write_text("unseen")
