# SPDX-License-Identifier: Apache-2.0
"""Gradient ascent with a weight per token, larger for tokens that are still likely.

The weights are computed from the model's probabilities, and no gradient flows through
them. To bind a loss, use
`terms.on_logps(losses.wga, model, "forget", reduce="token")`.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.losses._common import masked
from jaxunlearn.typing import Array


def wga(logps: Array, *, beta: float = 1.0, where: Array | None = None) -> Array:
    """Weighted gradient ascent: p ** beta * logps, minimised.

    p = exp(logps) has no gradient, so the gradient with respect to logps is p ** beta:
    it vanishes for tokens that are already forgotten. beta = 0 gives `ascent`.

    Args:
        logps: [...] float, log-probability of each target token, nats.
        beta: exponent of p, >= 0; the larger it is, the more likely tokens dominate.
        where: [...] bool, True where the token counts; None counts all.
    Returns:
        [...] float32, 0 where masked; reduce outside (the released code takes the mean
        over tokens).
    Raises:
        ValueError: if beta < 0 or where has another shape.
    References: https://arxiv.org/abs/2502.19301
    """
    _checks.not_negative("wga", beta=beta)
    return _weighted("wga", logps, where, lambda logp: jnp.exp(beta * logp))


def satimp(
    logps: Array,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    where: Array | None = None,
) -> Array:
    """SatImp (saturation and importance): p ** beta1 * (1 - p) ** beta2 * logps.

    The loss is minimised. The first factor gives a small weight to tokens that are
    already forgotten, the second to tokens of which the model is certain.
    p = exp(logps) has no gradient.

    Args:
        logps: [...] float, log-probability of each target token, nats.
        beta1: exponent of p, >= 0.
        beta2: exponent of 1 - p, >= 0.
        where: [...] bool, True where the token counts; None counts all.
    Returns:
        [...] float32, 0 where masked; reduce outside (the released code takes the mean
        over tokens).
    Raises:
        ValueError: if an exponent is negative or where has another shape.
    References: https://arxiv.org/abs/2505.11953
    """
    _checks.not_negative("satimp", beta1=beta1, beta2=beta2)

    def weight(logp):
        return jnp.exp(beta1 * logp) * (-jnp.expm1(logp)) ** beta2

    return _weighted("satimp", logps, where, weight)


def _weighted(owner, logps, where, weight):
    """weight(logps) * logps with no gradient through the weight.

    A token of probability 0 is forgotten: it adds 0, the limit, and has no gradient.
    """
    _checks.mask(owner, where, logps=logps)
    logps = _precision.at_least_float32(logps)
    counts = logps != -jnp.inf if where is None else where & (logps != -jnp.inf)
    logps = jnp.where(counts, logps, 0.0)
    fixed = jax.lax.stop_gradient(weight(jnp.minimum(logps, 0.0)))
    loss = fixed * logps
    return masked(loss, where)
