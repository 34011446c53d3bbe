# SPDX-License-Identifier: Apache-2.0
"""Targets of RMU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import losses


def test_a_steering_vector_has_its_length_and_no_negative_entry():
    one, other = (
        losses.steering_vector(jax.random.key(seed), 64, coefficient=6.5)
        for seed in (0, 1)
    )
    np.testing.assert_allclose(jnp.linalg.norm(one), 6.5, rtol=1e-6)
    assert (one >= 0).all()
    assert not np.allclose(one, other)


def test_an_adaptive_target_has_the_norm_of_the_reference_times_the_scale():
    states = jax.random.normal(jax.random.key(0), (2, 3, 8)).astype(jnp.bfloat16)
    direction = losses.steering_vector(jax.random.key(1), 8)
    target = losses.adaptive_target(states, direction, scale=3.0)
    assert target.dtype == jnp.float32
    sizes = 3 * jnp.linalg.norm(states.astype(jnp.float32), axis=-1)
    np.testing.assert_allclose(jnp.linalg.norm(target, axis=-1), sizes, rtol=1e-6)
    cosine = target @ direction / (sizes * jnp.linalg.norm(direction))
    np.testing.assert_allclose(cosine, 1, rtol=1e-6)


def test_targets_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="broadcasts to hidden .* same layer"):
        losses.rmu(jnp.zeros((2, 3, 8)), jnp.zeros((2, 4, 8)))
    with pytest.raises(ValueError, match="as wide as ref_hidden"):
        losses.adaptive_target(jnp.zeros((2, 3, 8)), jnp.ones(4))
    with pytest.raises(ValueError, match="coefficient > 0"):
        losses.steering_vector(jax.random.key(0), 8, coefficient=0.0)


def test_dpo_needs_both_arrays_of_the_losing_answer():
    with pytest.raises(ValueError, match="both lose_logps and lose_ref_logps"):
        losses.dpo(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="compat to be one of"):
        losses.dpo(jnp.zeros(2), jnp.zeros(2), compat="trl")
