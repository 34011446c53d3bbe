# SPDX-License-Identifier: Apache-2.0
"""The multiplier follows the constraint; a known problem is solved."""

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import combine

GRADS = {"forget": {"w": jnp.array([1.0, 0.0])}, "retain": {"w": jnp.array([1.0, 1.0])}}


def run(tx, retains):
    state, updates = tx.init(GRADS["retain"]), []
    for retain in retains:
        values = {"forget": jnp.float32(9.0), "retain": jnp.float32(retain)}
        update, state = tx.update(GRADS, state, values=values)
        updates.append(update["w"])
    return updates, state


def test_a_step_uses_the_multiplier_before_updating_it():
    tx = combine.primal_dual(epsilon=1.0, initial_dual=2.0, step_size=0.5, weight=3.0)
    updates, state = run(tx, [5.0, 1.0, -99.0])
    assert_allclose(updates[0], [5.0, 2.0])  # mu = 2
    assert_allclose(updates[1], [7.0, 4.0])  # mu = 2 + (5 - 1) / 2
    assert_allclose(updates[2], [7.0, 4.0])  # at the bound mu does not change
    assert_allclose(state.stats["dual"], 4.0)
    assert_allclose(state.stats["violation"], -100.0)
    assert state.dual == 0  # mu is never negative


def test_the_multiplier_is_constant_during_warmup():
    tx = combine.primal_dual(epsilon=0.0, initial_dual=1.0, warmup_steps=2)
    assert run(tx, [1.0, 1.0])[1].dual == 1
    assert run(tx, [1.0, 1.0, 1.0])[1].dual == 2


def test_it_converges_to_the_constrained_optimum_and_its_multiplier():
    """min (x - 3)^2 with x^2 <= 1: x = 1 and mu = 2, as 2 (1 - 3) + mu 2 = 0."""
    tx = optax.chain(
        combine.primal_dual(epsilon=1.0, initial_dual=0.0, step_size=0.2),
        optax.sgd(0.05),
    )

    def step(carry, _):
        x, state = carry
        grads = {"forget": {"x": 2 * (x - 3)}, "retain": {"x": 2 * x}}
        values = {"forget": (x - 3) ** 2, "retain": x**2}
        update, state = tx.update(grads, state, {"x": x}, values=values)
        return (x + update["x"], state), None

    x = jnp.float32(0.0)
    (x, state), _ = jax.lax.scan(step, (x, tx.init({"x": x})), length=2000)
    assert_allclose(x, 1.0, rtol=1e-3)
    assert_allclose(state[0].dual, 2.0, rtol=1e-3)


def test_bad_settings_and_missing_values_are_errors():
    with pytest.raises(ValueError, match="finite epsilon"):
        combine.primal_dual(epsilon=float("nan"))
    with pytest.raises(ValueError, match="initial_dual=-1.0"):
        combine.primal_dual(epsilon=0.0, initial_dual=-1.0)
    with pytest.raises(ValueError, match="two different terms, got 'a'"):
        combine.primal_dual(epsilon=0.0, forget="a", retain="a")
    tx = combine.primal_dual(epsilon=0.0)
    with pytest.raises(ValueError, match="make_step does"):
        tx.update(GRADS, tx.init(None))
    with pytest.raises(KeyError, match="values of terms 'retain'"):
        tx.update(GRADS, tx.init(None), values={"forget": jnp.float32(0.0)})
