"""Random numbers without a generator: each is a pure function of a seed and of keys that name what the number is for.

Nothing is drawn in sequence, so a number does not depend on workers, ranks, batches or the numbers drawn before it.
"""

from __future__ import annotations

import numpy as np

Key = np.ndarray | int

ORDER, CROPS, SUBSTITUTE, PROCEDURAL, CONTENTS = range(5)  # the first key after the seed: the purpose of the number

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits whose every output bit depends on every input bit (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*keys: Key) -> np.ndarray:
    """64 random bits (uint64) for the keys, which are broadcast."""
    bits = np.zeros(1, np.uint64)
    for key in keys:
        key = np.atleast_1d(np.asarray(key)).astype(np.int64).view(np.uint64)
        bits = _mix((bits + _GOLDEN) ^ _mix(key + _GOLDEN))  # arrays, not scalars: they overflow without a warning
    return bits


def random_uniform(*keys: Key) -> np.ndarray:
    """Uniform numbers in [0, 1) (fp64) for the keys, which are broadcast."""
    return (random_bits(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
