"""Rounds of a fuzz test: as many as fit into some seconds, each with a generator of its own that a failure names."""

import os
import time
from collections.abc import Callable

import numpy as np
from parity import SEED

SECONDS = float(os.environ.get("PATCHLIGHT_FUZZ_SECONDS", "3"))  # of each fuzz test
ONLY = os.environ.get("PATCHLIGHT_FUZZ_ROUND")  # repeats one round


def fuzz(attempt: Callable[[np.random.Generator], None], at_least: int = 20) -> int:
    """Calls `attempt` until the time is over, at least so often; returns how often. A failure says how to repeat it."""
    until = time.perf_counter() + SECONDS
    number = int(ONLY or 0)
    while True:
        try:
            attempt(np.random.default_rng([SEED, number]))
        except BaseException as error:
            error.add_note(f"Repeat with PATCHLIGHT_TEST_SEED={SEED} PATCHLIGHT_FUZZ_ROUND={number}.")
            raise
        number += 1
        if ONLY or (number >= at_least and time.perf_counter() >= until):
            return 1 if ONLY else number
