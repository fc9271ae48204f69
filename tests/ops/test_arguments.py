"""A wrong argument of any op gets one sentence, from Python: the rule, what was got, the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from parity import SEED

from patchlight_kernels import adamw, registry, square_sums

SENTENCE = re.compile(r"^\w+: .+, got .+; .+\.$", re.DOTALL)
WRONG_TENSORS = (np.zeros((2, 3), np.float32), [1.0, 2.0], 3, "x")
WRONG_LISTS = (torch.zeros(2), np.zeros(2), [None], [np.zeros(2)], 3, None)
INTEGERS = (0, -1, 1, 7, 2**31, 2**40, 2**63, -(2**40), True, 2.5, np.int64(3), "x", torch.tensor(2))
FLOATS = (0.0, -1.0, float("nan"), float("inf"), True, "x", np.float32(0.5), torch.tensor(0.5), 10**400)
OTHERS = {
    "grid": (*INTEGERS, None, (3,), (2.0, 3), (0, 5), (2**20, 2**20), (2**40, 1), (True, 6), (np.int64(2), 3), "ab"),
    "mean": (None, 3.0, (1.0, 2.0), ("a", "b", "c"), (0.1, float("nan"), 0.1), np.zeros(3)),
    "std": (None, (0.1, 0.0, 0.1), (0.1, float("inf"), 0.1)),
    "betas": (None, 0.9, (0.9,), (1.0, 0.9), (0.9, -0.1), ("a", "b")),
    "dtype": (None, "float32", torch.int64, torch.complex64),
    "decayed": (None, True, [True]),
    "frozen": (None, True, [True] * 1000),
    "return_scores": (None, 1, "x"),
    "border": (None, 3, "x"),
    "shape": (None, 3, "x"),
    "query_keys": (None, 3, "x"),
    "products": (3, "x"),
}
EXTRA = {"adamw": {"betas": (0.9, 0.999), "eps": 1e-8}, "prototype_ce": {"products": None}}
PUBLIC = {"adamw": adamw, "square_sums": square_sums}  # the specs of these two call them with lists


def wrong_values(name: str, value: object) -> tuple:
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, torch.Tensor):
        return (*WRONG_TENSORS, *(() if name in ("row_weight", "bias", "weight", "index", "table") else (None,)))
    if isinstance(value, list):
        return WRONG_LISTS
    return FLOATS if isinstance(value, float) else INTEGERS


def refusal(call: Callable, arguments: dict) -> str | None:
    """What the op says against the arguments; a RuntimeError, which C++ would raise, is not caught."""
    try:
        call(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("spec", registry.specs(), ids=lambda spec: spec.name)
def test_a_wrong_argument_gets_a_sentence(spec):
    """Or a right result: 1 may be a number of views, 2^40 a radius."""
    good = spec.unpack(spec.inputs(spec.tests[1], torch.float32, "cpu", SEED)) | EXTRA.get(spec.name, {})
    public, refused = PUBLIC.get(spec.name, spec.public), 0
    assert refusal(public, good) is None
    for name, value in good.items():
        for wrong in wrong_values(name, value):
            said = refusal(public, good | {name: wrong})
            assert said is None or SENTENCE.match(said), f"{name}={wrong!r}: {said}"
            refused += said is not None
    assert refused >= len(good)


def test_an_array_is_told_the_way_to_a_tensor():
    with pytest.raises(
        TypeError, match=r"tensors\[0\] must be a tensor, got numpy.ndarray; call torch.from_numpy on it"
    ):
        square_sums([np.zeros(3)])
