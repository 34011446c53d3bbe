# SPDX-License-Identifier: Apache-2.0
"""Losses and metrics of whole distributions where entries of the vocabulary have the
logit -inf."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import losses, metrics

TARGETS = jnp.array([0, 2, 4])
PLACES = (1, 3)  # masked; targets are the first, second and third of the other entries
VISIBLE = np.array([0, 2, 4])


def of_tokens(loss, *arguments):
    """A loss of log-probabilities as one of logits; its other arguments: constants."""

    def run(logits, ref_logits, targets):
        logps = losses.token_logps(logits, targets)
        return loss(logps, *(jnp.full_like(logps, x) for x in arguments))

    return run


def plain(loss):
    return lambda logits, ref_logits, targets: loss(logits)


def with_reference(loss):
    return lambda logits, ref_logits, targets: loss(logits, ref_logits)


def with_targets(loss):
    return lambda logits, ref_logits, targets: loss(logits, targets)


LOSSES = {
    "token_logps": with_targets(losses.token_logps),
    "nll": of_tokens(losses.nll),
    "ascent": of_tokens(losses.ascent),
    "js_target": of_tokens(losses.js_target),
    "wga": of_tokens(losses.wga),
    "satimp": of_tokens(losses.satimp),
    "npo": of_tokens(losses.npo, -2.0),
    "simnpo": of_tokens(losses.simnpo, 1.0),
    "dpo": of_tokens(losses.dpo, -2.0, -3.0, -1.0),
    "npo_logits": with_reference(losses.npo_logits),
    "kl forward": with_reference(losses.kl),
    "kl reverse": with_reference(partial(losses.kl, direction="reverse")),
    "kl raw": with_reference(partial(losses.kl, normalize=False)),
    "kl raw reverse": with_reference(
        partial(losses.kl, normalize=False, direction="reverse")
    ),
    "kl_uniform forward": plain(losses.kl_uniform),
    "kl_uniform reverse": plain(partial(losses.kl_uniform, direction="reverse")),
    "js": with_reference(losses.js),
    "undial": losses.undial,
    "ce_u": with_targets(losses.ce_u),
    "complementary_ce": with_targets(losses.complementary_ce),
    "logit_margin": plain(losses.logit_margin),
    "metrics.standardised_logps": with_targets(metrics.standardised_logps),
    "metrics.class_probability": plain(partial(metrics.class_probability, class_id=0)),
}
FORGET = ("wga", "satimp", "npo", "simnpo", "ce_u", "undial")
HIDDEN = {"rmu", "steering_vector", "adaptive_target"}  # of hidden states


def logits(seed):
    return np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32)


def masked(x, places=PLACES):
    x = np.array(x)
    x[:, list(places)] = -np.inf
    return x


P, Q = logits(0), logits(1)
TARGET_MASKED = P.copy()
TARGET_MASKED[range(3), TARGETS] = -np.inf
LONE = np.where(TARGET_MASKED == -np.inf, P, -np.inf)  # only the target is visible
NAN = np.where(np.arange(5) == 1, np.nan, P)
CASES = {  # three rows each, all in one call of the loss
    "both": (masked(P), masked(Q)),
    "model": (masked(P), Q),
    "reference": (P, masked(Q)),
    "each": (masked(P, [1]), masked(Q, [3])),
    "target": (TARGET_MASKED, Q),
    "lone": (LONE, LONE),
    "nan": (NAN, Q),
}


def values_and_grads(loss, p, q, targets):
    """[rows] values and [rows, V] gradients."""

    @jax.jit
    def run(p):
        values, back = jax.vjp(lambda p: loss(p, jnp.asarray(q), targets), p)
        return values, back(jnp.ones_like(values))[0]

    return map(np.asarray, run(jnp.asarray(p)))


def test_every_loss_is_here():
    assert (
        set(losses.__all__) == {x.split()[0] for x in LOSSES if "." not in x} | HIDDEN
    )


@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries(name):
    p, q = (np.concatenate(x) for x in zip(*CASES.values(), strict=True))
    rows = jnp.tile(TARGETS, len(CASES))
    values, grads = values_and_grads(LOSSES[name], p, q, rows)
    values = dict(zip(CASES, np.split(values, len(CASES)), strict=True))
    grads = dict(zip(CASES, np.split(grads, len(CASES)), strict=True))
    for case in ("both", "model", "reference", "each"):
        assert np.isfinite(values[case]).all() and np.isfinite(grads[case]).all()
        if name in ("kl forward", "kl reverse", "js"):
            assert (values[case] > 0).all()
    assert np.isnan(values["nan"]).all()  # NaN is never taken for a mask
    if name in FORGET:  # a target of probability 0 is forgotten
        assert (
            np.isfinite(values["target"]).all() and np.isfinite(grads["target"]).all()
        )
    if name in ("wga", "satimp", "npo", "simnpo"):
        assert (values["target"] == 0).all() and (grads["target"] == 0).all()
    if name in ("ce_u", "complementary_ce"):
        assert (values["lone"] == 0).all() and (grads["lone"] == 0).all()

    # An entry that both mask is not part of the vocabulary.
    if name == "npo_logits":  # there it counts as equal: ratio 1 at beta = 0.1
        values["both"] = (5 * values["both"] - 2 * 20 * np.log(2)) / 3
        grads["both"] = 5 / 3 * grads["both"]
    few = [x[:, VISIBLE] for x in (P, Q)]
    value, grad = values_and_grads(LOSSES[name], *few, TARGETS // 2)
    assert_allclose(values["both"], value, rtol=1e-5, atol=1e-6)
    assert_allclose(grads["both"][:, VISIBLE], grad, rtol=1e-5, atol=1e-6)
    assert (grads["both"][:, list(PLACES)] == 0).all()


def test_divergences_of_supports_by_hand():
    p = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    q = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    # The entry has probability 0 under the weighting distribution q.
    assert_allclose(losses.kl(p, q), 0.5 * np.log(2), rtol=1e-6)
    # Without the last entry the weighting distribution p is 2/3 and 1/3.
    wanted = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    assert_allclose(losses.kl(p, q, direction="reverse"), wanted, rtol=1e-5)
    two = jnp.array([0.0, 0.0, -jnp.inf])
    for direction in ("forward", "reverse"):
        assert_allclose(losses.kl_uniform(two, direction=direction), 0.0, atol=1e-7)


def test_answers_that_are_impossible_for_both_models():
    never = jnp.full(3, -jnp.inf)
    for loss in (losses.npo, losses.dpo):
        value, back = jax.vjp(partial(loss, ref_logps=never), never)
        assert np.isfinite(value).all() and (back(jnp.ones(3))[0] == 0).all()
