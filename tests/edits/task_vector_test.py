# SPDX-License-Identifier: Apache-2.0
"""Task vectors: a value by hand, identity at scale 0, dtypes and sharding."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn import edits

PARAMS = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.ones((8, 2), jnp.bfloat16)}}
TUNED = jax.tree.map(lambda x: x + 1, PARAMS)


def test_the_vector_is_subtracted_scale_times():
    new = edits.task_vector(PARAMS, TUNED, scale=5.0)
    assert_array_equal(new["a"], [-4.0, -3.0])
    new = edits.task_vector(TUNED, TUNED, PARAMS, scale=0.5)
    assert_array_equal(new["a"], [1.5, 2.5])


def test_scale_0_is_the_identity_and_dtypes_do_not_change():
    new = edits.task_vector(PARAMS, TUNED, scale=0.0)
    jax.tree.map(assert_array_equal, new, PARAMS)
    assert new["b"]["c"].dtype == jnp.bfloat16


def test_sharding_does_not_change():
    place = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    cut = {"c": jax.device_put(PARAMS["b"]["c"], place)}
    new = edits.task_vector(cut, TUNED["b"])["c"]
    assert new.sharding.is_equivalent_to(place, 2)


def test_other_trees_are_refused():
    with pytest.raises(ValueError, match="tuned .* differences at 'a'"):
        edits.task_vector(PARAMS, TUNED | {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match="finite scale"):
        edits.task_vector(PARAMS, TUNED, scale=float("inf"))
