"""COCO annotations with values of any kind in any place: what is usable is read, or one sentence says what is wrong."""

import json
import re

import numpy as np
from fuzz.rounds import fuzz

from patchlight.evaluation.detect.annotations import read_part
from patchlight.evaluation.detect.scores import true_objects
from patchlight.evaluation.layouts.coco import write_coco

JUNK = [None, 0, -1, 1e9, float("nan"), float("inf"), "", "x", "\0", True, 2**70, 3.5, [], {}, [[]], [1], [None] * 4,
        {"size": [32, 32]}, {"size": [32, 32], "counts": [5]}]  # fmt: skip


def places(value: object, before: tuple = ()) -> list[tuple]:
    """The keys that lead to each value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, part in inner for path in [(*before, key), *places(part, (*before, key))]]


def test_any_value_in_any_place(tmp_path):
    root = write_coco(tmp_path / "coco", images=6, size=32, seed=1)
    file = root / "annotations/instances_train2017.json"
    facts = json.loads(file.read_text())
    everywhere = places(facts)
    shallow = [path for path in everywhere if len(path) <= 4]

    def attempt(rng: np.random.Generator) -> None:
        changed = json.loads(json.dumps(facts))
        for _ in range(rng.integers(1, 4)):
            *way, last = (shallow if rng.random() < 0.8 else everywhere)[rng.integers(len(shallow))]
            place = changed
            try:
                for key in way:
                    place = place[key]
                place[last] = JUNK[rng.integers(len(JUNK))]
            except (TypeError, KeyError, IndexError):
                pass  # an earlier change took the place away
        file.write_text(json.dumps(changed))
        try:
            part = read_part(root, "train2017")
        except ValueError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert re.fullmatch(r".+, got .*; .+\.", said)
            return
        assert len(true_objects(part, part.images)["annotations"]) == sum(len(i.decoded_masks()) for i in part.images)

    assert fuzz(attempt) >= 1
