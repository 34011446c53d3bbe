# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities and the KL divergence, beyond the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import losses

KEYS = jax.random.split(jax.random.key(0), 2)
LOGITS, REF = (3 * jax.random.normal(key, (4, 6, 11)) for key in KEYS)


def test_token_logps_is_the_gathered_log_softmax():
    targets = jnp.arange(24).reshape(4, 6) % 11
    whole = jax.nn.log_softmax(LOGITS)
    expected = np.take_along_axis(np.asarray(whole), np.asarray(targets)[..., None], -1)
    assert_allclose(losses.token_logps(LOGITS, targets), expected[..., 0], atol=2e-6)


def test_token_logps_never_wraps_a_label():
    """A label outside the vocabulary gives nan where it counts, and 0 where masked."""
    logits, targets = jnp.zeros((3, 200)), jnp.array([-100, 200, 5])
    assert_allclose(
        losses.token_logps(logits, targets), [np.nan, np.nan, -np.log(200)], rtol=1e-6
    )
    where = targets == 5
    run = jax.value_and_grad(
        lambda z: losses.token_logps(z, targets, where=where).sum()
    )
    value, grad = run(logits)
    assert_allclose(value, -np.log(200), rtol=1e-6)
    assert np.isfinite(grad).all() and not grad[:2].any()


def test_token_logps_of_large_bfloat16_logits_keeps_the_tail():
    logits = jnp.array([[90.0, 60.0]], jnp.bfloat16)
    assert_allclose(losses.token_logps(logits, jnp.array([1])), [-30.0], rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_zero_at_the_reference_and_positive_elsewhere(direction):
    def total(z):
        return losses.kl(z, REF, direction=direction).sum()

    value, grad = jax.value_and_grad(total)(REF)
    assert_allclose(value, 0.0, atol=1e-6)
    assert_allclose(grad, 0.0, atol=1e-6)
    assert (losses.kl(LOGITS, REF, direction=direction) > 0).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_does_not_depend_on_a_shift_of_the_logits(direction):
    shifted = losses.kl(LOGITS + 100.0, REF - 50.0, direction=direction)
    plain = losses.kl(LOGITS, REF, direction=direction)
    assert_allclose(shifted, plain, rtol=1e-3, atol=1e-4)


def test_reverse_kl_is_forward_kl_with_swapped_arguments():
    assert_allclose(
        losses.kl(LOGITS, REF, direction="reverse"), losses.kl(REF, LOGITS), rtol=1e-6
    )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_allows_logits_of_minus_infinity_in_both(direction):
    masked, ref = (x.at[..., 0].set(-jnp.inf) for x in (LOGITS, REF))
    run = jax.value_and_grad(lambda z: losses.kl(z, ref, direction=direction).sum())
    value, grad = run(masked)
    rest = losses.kl(LOGITS[..., 1:], REF[..., 1:], direction=direction).sum()
    assert_allclose(value, rest, rtol=1e-6)
    assert np.isfinite(grad).all()


def test_an_unknown_direction_is_named():
    with pytest.raises(
        ValueError, match="direction.*'forwards'.*Did you mean 'forward'"
    ):
        losses.kl(LOGITS, REF, direction="forwards")
