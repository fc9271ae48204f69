"""The procedural videos in DAVIS layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ...data import procedural_video
from ...usage import POSITIONAL


def write_davis(
    out: Annotated[Path, POSITIONAL], videos: int = 8, frames: int = 24, size: int = 192, seed: int = 0
) -> Path:
    """Videos of the procedural objects with true masks.

    Args:
        out: a new folder.
        videos: how many.
        frames: of each.
        size: side of a frame.
        seed: other seeds give other videos.
    """
    return procedural_video.write_davis(out, videos, frames, size, seed)
