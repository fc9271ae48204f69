"""Damage for files, and limits that a reader of damaged files must keep."""

import contextlib
import resource
import struct
import time
import zlib
from collections.abc import Iterator

import numpy as np

_NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00FFFFFF, 0xFFFF, 0x4000)
MEGABYTES, SECONDS = 512, 20  # more than any of them needs, on any machine


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The data with up to eight changes, many of them near the start."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        end = min(len(out), 200) if rng.random() < 0.5 else len(out)
        place = int(rng.integers(0, max(1, end)))
        length = int(rng.integers(1, 64))
        match rng.integers(6):
            case 0:
                out[place : place + 1] = rng.bytes(1)
            case 1:
                out[place : place + 4] = struct.pack(rng.choice(["<I", ">I"]), rng.choice(_NUMBERS))
            case 2:
                out[place : place + length] = rng.bytes(length)
            case 3:
                del out[place : place + length]
            case 4:
                out[place:place] = out[place : place + length] * int(rng.integers(1, 5))
            case 5 if rng.random() < 0.3:
                del out[place:]
    return bytes(out)


def with_png_checksums(data: bytes) -> bytes:
    """The chunks of a PNG with the checksums that belong to them, so that their contents are looked at."""
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, place)
        end = place + 8 + length
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def with_tar_checksums(data: bytes) -> bytes:
    """Every block that looks like a header with the checksum that belongs to it."""
    out = bytearray(data)
    for place in range(0, len(out) - 511, 512):
        if out[place + 257 : place + 262] == b"ustar":
            out[place + 148 : place + 156] = b" " * 8
            out[place + 148 : place + 156] = b"%06o\0 " % sum(out[place : place + 512])
    return bytes(out)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Within the block, this process gets so much more memory only; afterwards, it must not have computed for too long."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEGABYTES * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < SECONDS
