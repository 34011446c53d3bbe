# SPDX-License-Identifier: Apache-2.0
"""The properties stated in the docstrings of the preference losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import losses

LOGPS = jnp.array([-3.0, -40.0, -700.0])


def slope(loss, x):
    return jax.grad(lambda x: loss(x).sum())(x)


@pytest.mark.parametrize("beta", [0.1, 0.15, 1.0, 5.0])
def test_npo_at_the_reference(beta):
    """Value 2 ln 2 / beta, gradient that of ascent: 13.863 at 0.1, 9.242 at 0.15."""
    loss = partial(losses.npo, ref_logps=LOGPS, beta=beta)
    assert_allclose(loss(LOGPS), 2 * np.log(2.0) / beta, rtol=1e-6)
    assert_allclose(slope(loss, LOGPS), slope(losses.ascent, LOGPS), rtol=1e-6)


def test_npo_tends_to_ascent_as_beta_tends_to_zero():
    loss = partial(losses.npo, ref_logps=LOGPS + 5.0, beta=1e-5)
    assert_allclose(slope(loss, LOGPS), 1.0, rtol=1e-4)


def test_npo_gradient_vanishes_when_forgotten_and_is_at_most_two():
    loss = partial(losses.npo, ref_logps=jnp.zeros(3), beta=1.0)
    pushes = slope(loss, jnp.array([-50.0, 0.0, 50.0]))
    assert_allclose(pushes, [0.0, 1.0, 2.0], atol=1e-6)


def test_npo_with_a_constant_reference_equals_simnpo():
    """With reference 0 and answers of one token, both are functions of beta * logps."""
    ones = jnp.ones(3)
    short = jnp.array([-1.0, -2.0, 0.5])
    assert_allclose(
        losses.npo(short, 0 * short, beta=2.0), losses.simnpo(short, ones, beta=2.0)
    )


def test_simnpo_is_finite_for_an_answer_without_tokens():
    value, grad = jax.value_and_grad(losses.simnpo)(jnp.float32(0), jnp.int32(0))
    assert np.isfinite(value) and np.isfinite(grad)


def test_raw_logit_npo_at_the_reference_has_equal_gradients():
    logits = jnp.array([[1.0, -2.0, 3.0, 0.0]])
    loss = partial(losses.npo_logits, ref_logits=logits, beta=0.15)
    assert_allclose(loss(logits), 2 * np.log(2.0) / 0.15, rtol=1e-6)
    assert_allclose(slope(loss, logits), 0.25, rtol=1e-6)


def test_sequence_npo_at_the_reference_is_ascent_on_the_logits():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    targets = jnp.arange(10).reshape(2, 5) % 7

    def logps(z):
        return losses.token_logps(z, targets).sum(-1)

    npo = jax.grad(lambda z: losses.npo(logps(z), logps(logits)).sum())(logits)
    ascent = jax.grad(lambda z: losses.ascent(logps(z)).sum())(logits)
    assert_allclose(npo, ascent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [losses.npo, losses.simnpo, losses.npo_logits])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_beta_must_be_positive(loss, beta):
    with pytest.raises(ValueError, match=f"{loss.__name__} needs beta > 0"):
        loss(jnp.zeros((2, 2)), jnp.zeros((2, 2)), beta=beta)


def test_shapes_must_agree():
    with pytest.raises(
        ValueError, match=r"npo needs arrays of one shape.*\(2,\).*\(3,\)"
    ):
        losses.npo(jnp.zeros(2), jnp.zeros(3))


def test_a_traced_beta_does_not_recompile():
    run = jax.jit(lambda beta: losses.npo(LOGPS, LOGPS, beta=beta))
    run(0.1), run(0.2)
    assert run._cache_size() == 1
