"""What trackers (TensorBoard, Weights & Biases) get of a run, and which trackers there are."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..checks import check

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # by the names in Output.track


@dataclass(frozen=True, slots=True)
class Entry:
    """A log line, a look at the teacher, or a diagnosis."""

    seconds: float
    """Since 1970."""
    step: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG files."""
    name: str = ""
    """Of a diagnosis."""
    sentence: str = ""


def trackers_of(track: Sequence[str]) -> list[str]:
    """The trackers that Output.track stands for; an error if the package of one is missing."""
    for name in track:
        there = name == "auto" or importlib.util.find_spec(PACKAGES[name]) is not None
        rule, remedy = (
            f"Output.track {name} needs the package {name}",
            "pip install 'patchlight[tracking]', or leave it out",
        )
        check(there, rule, "a Python without it", remedy)
    found = [name for name in PACKAGES if name in track]
    auto = "auto" in track and importlib.util.find_spec("tensorboard") is not None
    return ["tensorboard", *(name for name in found if name != "tensorboard")] if auto else found
