# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cost against work runs every axis, on a tiny model."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import cost

TINY = cost.SHAPE | dict(vocab=32, width=16, heads=2, kv_heads=2, head_dim=8, hidden=24)


@pytest.mark.slow
def test_every_axis_is_measured(monkeypatch):
    monkeypatch.setattr(cost, "LENGTH", 8)
    sizes = {name: (2, 4) for name in cost.AXES} | {"length": (4, 8)}
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        found = cost.measure(2, sizes, TINY)
    assert set(found["axes"]) == set(cost.WORK)
    for axis in found["axes"].values():
        first, last = axis["seconds"]
        assert axis["exponent"] == pytest.approx(np.log2(last / first))
        assert axis["met"] == (axis["exponent"] <= cost.LIMIT)


def test_rows_have_the_lengths_that_are_given():
    lengths = cost._table(200, 16, 32, shortest=4)["mask"].sum(1)
    assert (lengths.min(), lengths.max()) == (4, 16)
    assert cost._table(3, 16, 32)["mask"].all()
