"""What cannot be written does not end a run: said once per cause, kept within bounds, tried again."""

import errno

from patchlight.report.outlet import Outlet


class Disk:
    """Takes entries, or fails."""

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.error: Exception | None = None

    def write(self, entries: list[int]) -> None:
        if self.error:
            raise self.error
        self.entries += entries


def outlet(most: int = 100) -> tuple[Outlet[int], Disk, list[str]]:
    disk, said = Disk(), []
    return Outlet("x.jsonl", disk.write, said.append, most), disk, said


def test_entries_wait_in_order_and_each_cause_is_said_once():
    place, disk, said = outlet()
    place.put(0)
    for error in (OSError(errno.ENOSPC, "No space left"), OSError(errno.EACCES, "Permission denied")):
        disk.error = error
        for _ in range(3):
            place.put(len(disk.entries) + len(place.waiting))
    assert [sentence.split("; ")[0] for sentence in said] == [
        "A run must be able to write x.jsonl, got OSError: [Errno 28] No space left",
        "A run must be able to write x.jsonl, got PermissionError: [Errno 13] Permission denied",
    ]
    assert all("training goes on" in sentence and "kept and tried again" in sentence for sentence in said)
    disk.error = None
    place.put(7)
    assert disk.entries == list(range(8))
    assert said[2:] == ["x.jsonl could be written again, with 7 entries that waited or are new."]
    disk.error = OSError(errno.ENOSPC, "No space left")
    place.put(8)
    assert len(said) == 4, "a second time is said again"


def test_too_many_drop_the_oldest_aloud():
    place, disk, said = outlet(most=5)
    disk.error = OSError(errno.ENOSPC, "No space left")
    for number in range(9):
        place.put(number)
    assert len([sentence for sentence in said if "5 entries of x.jsonl wait" in sentence]) == 1
    disk.error = None
    place.flush()
    assert disk.entries == [4, 5, 6, 7, 8]
    assert said[-1].endswith("; 4 were dropped.")


def test_the_end_tells_what_is_lost():
    place, disk, said = outlet()
    disk.error = ValueError("no reason")
    place.put(1)
    place.close()
    assert said[-1] == "x.jsonl could not be written until the end: one entry is lost."
    disk.error = None
    place.close()
    assert disk.entries == [1]
