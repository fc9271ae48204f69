"""Random numbers that depend on their keys alone."""

import numpy as np
import pytest

from patchlight.data.random_numbers import random_bits, random_uniform

STORED = (0x6EC19CB5EED562E0, 0xCFB19174034E775C)


def test_a_number_depends_on_its_keys_only():
    table = random_uniform(7, 1, np.arange(50)[:, None], np.arange(9))
    assert table.shape == (50, 9)
    assert np.array_equal(table[[3, 41]], random_uniform(7, 1, np.array([3, 41])[:, None], np.arange(9)))
    assert table[17, 5] == random_uniform(7, 1, 17, 5)[0]


@pytest.mark.parametrize("changed", [(8, 1, 17, 5), (7, 2, 17, 5), (7, 1, 18, 5), (7, 1, 17, 6), (7, 1, 5, 17)])
def test_every_key_matters(changed):
    assert random_bits(7, 1, 17, 5) != random_bits(*changed)


def test_the_values_stay_what_they_are():
    """A change would alter every run without an error: checkpoints could not resume with the same data."""
    assert random_bits(0, 0, 0)[0] == np.uint64(STORED[0])
    assert random_bits(3, -1, 2**40)[0] == np.uint64(STORED[1])


def test_uniform_numbers_are_uniform_and_independent():
    u = random_uniform(0, 5, np.arange(100_000), 2)
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * len(u))
    counts = np.bincount((u * 64).astype(int), minlength=64)
    assert ((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)
    other = random_uniform(0, 5, np.arange(100_000), 3)
    for a, b in ((u[:-1], u[1:]), (u, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))
