"""Records that cross processes."""

from __future__ import annotations

import pickle

import numpy as np

from switchkd.types import Ragged


def test_ragged_arrays_split_into_their_parts() -> None:
    """`split` gives the parts of `concat`, empty ones included, and `select` keeps the given order."""
    parts = [np.arange(6).reshape(3, 2), np.zeros((0, 2), np.int64), np.full((1, 2), 9)]
    ragged = Ragged.concat(parts, np.int32)
    assert ragged.values.dtype == np.int32 and ragged.lengths.tolist() == [3, 0, 1]
    for one, other in zip(ragged.split(), parts, strict=True):
        np.testing.assert_array_equal(one, other)
    chosen = pickle.loads(pickle.dumps(ragged.select([2, 0])))
    assert chosen.lengths.tolist() == [1, 3] and chosen.values.tolist() == [[9, 9], [0, 1], [2, 3], [4, 5]]
    assert Ragged(np.zeros(0), np.zeros(0, np.int32)).split() == []
