# SPDX-License-Identifier: Apache-2.0
"""Dampening and interpolation: values by hand, identities, dtypes and sharding."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import edits

PARAMS = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.ones((8, 2), jnp.bfloat16)}}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
EDITS = {
    "dampen": partial(edits.dampen, forget=jax.tree.map(lambda x: 64 * x, ONES)),
    "interpolate": partial(edits.interpolate, weight=0.25),
}


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_weight_above_alpha_shrinks_by_the_ratio(wrapper):
    #                 below  at     above  dead  D only  neither
    forget = jnp.array([5.0, 10.0, 20.0, 1.0, 0.0, 0.0])
    all_data = jnp.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    x = jnp.array([2.0, 2.0, -2.0, 2.0, 2.0, 2.0])
    new = wrapper(edits.dampen)(x, forget=forget, all_data=all_data)
    assert_allclose(new, [2.0, 2.0, -0.1, 0.0, 2.0, 2.0], rtol=1e-6)


def test_alpha_selects_and_lambda_sets_the_strength():
    ratio = partial(
        edits.dampen,
        jnp.ones(3),
        forget=jnp.array([2.0, 4.0, 8.0]),
        all_data=jnp.ones(3),
    )
    assert_allclose(ratio(alpha=3.0), [1.0, 0.25, 0.125])
    assert_allclose(ratio(alpha=1.0, lambda_=2.0), [1.0, 0.5, 0.25])
    assert_allclose(
        ratio(alpha=1.0, lambda_=4.0), [1.0, 1.0, 0.5]
    )  # weights never grow


def test_the_same_importance_everywhere_is_the_identity():
    jax.tree.map(
        assert_array_equal, edits.dampen(PARAMS, forget=ONES, all_data=ONES), PARAMS
    )


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_interpolation_is_between_the_two_models(weight):
    new = edits.interpolate(PARAMS, ONES, weight=weight)
    assert_allclose(new["a"], [1.0, 2.0 - weight])
    assert new["b"]["c"].dtype == jnp.bfloat16


def test_weight_one_is_exactly_the_other_model():
    odd = jnp.array([0.1, 1e20, -3e-8])
    assert_array_equal(edits.interpolate(jnp.ones(3), odd, weight=1.0), odd)
    assert_array_equal(edits.interpolate(odd, jnp.ones(3), weight=0.0), odd)


@pytest.mark.parametrize("name", EDITS)
def test_dtypes_and_sharding_do_not_change(name):
    place = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    cut = {"a": PARAMS["a"], "b": {"c": jax.device_put(PARAMS["b"]["c"], place)}}
    new = EDITS[name](cut, **{"dampen": {"all_data": ONES}}.get(name, {"other": ONES}))
    assert new["b"]["c"].sharding.is_equivalent_to(place, 2)
    assert new["b"]["c"].dtype == jnp.bfloat16


def test_bad_arguments():
    with pytest.raises(ValueError, match="alpha > 0"):
        edits.dampen(PARAMS, forget=ONES, all_data=ONES, alpha=0.0)
    with pytest.raises(ValueError, match="lambda_ > 0"):
        edits.dampen(PARAMS, forget=ONES, all_data=ONES, lambda_=-1.0)
    for bad in (-1.0, jnp.nan):
        broken = ONES | {"a": jnp.array([1.0, bad])}
        with pytest.raises(ValueError, match="all_data >= 0, .* at 'a'"):
            edits.dampen(PARAMS, forget=ONES, all_data=broken)
    other = PARAMS | {"a": jnp.zeros(3)}
    with pytest.raises(ValueError, match="forget .* differences at 'a'"):
        edits.dampen(PARAMS, forget=other, all_data=ONES)
    with pytest.raises(ValueError, match="other .* differences at 'a'"):
        edits.interpolate(PARAMS, other)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"weight in \[0, 1\], got weight="):
            edits.interpolate(PARAMS, ONES, weight=weight)
