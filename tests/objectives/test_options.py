"""Every option of every method has a text, which --help-all and docs/api.md show."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from patchlight.objectives import OBJECTIVES
from patchlight.usage import texts_of


def kinds_in(kind: type) -> list[type]:
    """A dataclass and those of its fields."""
    below = [
        found for hint in get_type_hints(kind).values() for found in (hint, *get_args(hint)) if is_dataclass(found)
    ]
    return [kind, *(deeper for found in below for deeper in kinds_in(found))]


@pytest.mark.parametrize(
    "name", [name for name, kind in OBJECTIVES.items() if kind.__module__.startswith("patchlight.")]
)
def test_every_field_has_a_text(name):
    for kind in kinds_in(OBJECTIVES[name]):
        texts = texts_of(kind)
        assert not [field.name for field in fields(kind) if len(texts.get(field.name, "")) < 10], kind.__name__


def test_groups_within_options_count():
    assert [kind.__name__ for kind in kinds_in(OBJECTIVES["SelfPatchOptions"])] == ["SelfPatchOptions", "NeighborRule"]
