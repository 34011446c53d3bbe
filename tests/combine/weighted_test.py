# SPDX-License-Identifier: Apache-2.0
"""Weighted sums, and the penalty."""

import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import combine

GRADS = {"forget": {"w": jnp.array([1.0, 0.0])}, "retain": {"w": jnp.array([1.0, 1.0])}}


def run(tx, steps=1):
    state = tx.init(GRADS["retain"])
    for _ in range(steps):
        update, state = tx.update(GRADS, state)
    return update["w"], state


def test_no_weights_adds_every_term():
    assert_allclose(run(combine.weighted_sum())[0], [2.0, 1.0])
    assert run(combine.weighted_sum())[1].stats == {}


def test_weights_and_schedules_are_evaluated_at_the_step():
    ramp = optax.linear_schedule(0.0, 10.0, 10)
    tx = combine.weighted_sum({"retain": jnp.float32(2.0), "forget": ramp})
    update, state = run(tx, steps=4)
    assert_allclose(update, [5.0, 2.0])
    assert_allclose(state.stats["weight/forget"], 3.0)
    assert_allclose(state.stats["weight/retain"], 2.0)


def test_the_sum_is_in_float32_and_rounded_once():
    """1 - 1 + 2^-9 is 0 if each partial sum is rounded to bfloat16's eight bits."""
    terms = {"a": 1.0, "b": 2.0**-9, "c": -1.0}
    grads = {name: {"w": jnp.array([x], jnp.bfloat16)} for name, x in terms.items()}
    update, _ = combine.weighted_sum().update(grads, combine.weighted_sum().init(None))
    assert update["w"].dtype == jnp.bfloat16
    assert_allclose(update["w"].astype(jnp.float32), [2.0**-9])


@pytest.mark.parametrize(
    "weights", [{"forget": float("nan")}, {"forget": float("inf")}]
)
def test_a_weight_must_be_finite(weights):
    with pytest.raises(
        ValueError, match="weighted_sum needs a finite weight of 'forget'"
    ):
        combine.weighted_sum(weights)


def test_empty_weights_are_an_error():
    with pytest.raises(ValueError, match="at least one weight"):
        combine.weighted_sum({})


def test_penalty_is_upper_plus_strength_times_lower():
    assert_allclose(run(combine.penalty(strength=2.0))[0], [3.0, 1.0])
    update, state = run(combine.penalty(strength=lambda count: count + 1), steps=3)
    assert_allclose(update, [4.0, 1.0])
    assert_allclose(state.stats["strength"], 3.0)


def test_penalty_equals_pen_of_the_released_code():
    tx = combine.penalty(upper="forget", lower="retain", strength=1.0)
    assert_allclose(run(tx)[0], [2.0, 1.0])


@pytest.mark.parametrize(
    "make", [lambda **k: combine.penalty(strength=1.0, **k), combine.blur]
)
def test_the_levels_must_differ(make):
    with pytest.raises(ValueError, match="different terms, got .*'forget'"):
        make(upper="forget", lower="forget")


def test_a_negative_strength_is_an_error():
    with pytest.raises(ValueError, match="penalty needs strength >= 0"):
        combine.penalty(strength=-1.0)
