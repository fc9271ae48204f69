"""Random numbers without a generator: a pure function of a seed and of words that say what the number is for.

Nothing is drawn in sequence, so a number depends neither on workers, ranks or batches nor on what was drawn before it.
"""

from __future__ import annotations

import numpy as np

Words = np.ndarray | int

ORDER, CROPS, SUBSTITUTE, PROCEDURAL = range(4)  # the first word after the seed: what the number is for

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits whose every output bit depends on every input bit (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_bits(*words: Words) -> np.ndarray:
    """64 random bits (uint64) for the words, which broadcast like operands."""
    bits = np.zeros(1, np.uint64)
    for word in words:
        word = np.atleast_1d(np.asarray(word)).astype(np.int64).view(np.uint64)
        bits = _mix((bits + _GOLDEN) ^ _mix(word + _GOLDEN))  # arrays, not scalars, wrap without a warning
    return bits


def counter_uniform(*words: Words) -> np.ndarray:
    """Uniform numbers in [0, 1) (fp64) for the words, which broadcast like operands."""
    return (counter_bits(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
