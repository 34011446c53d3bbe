# SPDX-License-Identifier: Apache-2.0
"""Ascent with a weight for each token: tokens the model still knows are pushed more.

Bind them with `terms.on_logps(losses.wga, model, "forget", reduce="token")`. The
weights are read off the model itself and no gradient flows through them.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.losses._likelihood import at_least_float32
from jaxunlearn.typing import Array


def wga(logps: Array, *, beta: float = 1.0, where: Array | None = None) -> Array:
    """Weighted gradient ascent: p ** beta * logps, minimised.

    With p = exp(logps) held fixed, the gradient for logps is p ** beta: it vanishes for
    tokens that are forgotten already. With beta = 0 this is `ascent`.

    Args:
        logps: [...] float, log-probability of each target token, nats.
        beta: how much confident tokens outweigh others, >= 0.
        where: [...] bool, True where the token counts; None counts all.
    Returns:
        [...] float32, 0 where masked; reduce outside (the code: mean over tokens).
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
    """Saturation and importance: p ** beta1 * (1 - p) ** beta2 * logps, minimised.

    The first factor spares tokens that are forgotten already, the second those of which
    the model is certain. p is held fixed.

    Args:
        logps: [...] float, log-probability of each target token, nats.
        beta1: exponent of p, >= 0.
        beta2: exponent of 1 - p, >= 0.
        where: [...] bool, True where the token counts; None counts all.
    Returns:
        [...] float32, 0 where masked; reduce outside (the code: mean over tokens).
    Raises:
        ValueError: if an exponent is negative or where has another shape.
    References: https://arxiv.org/abs/2505.11953
    """
    _checks.not_negative("satimp", beta1=beta1, beta2=beta2)

    def weight(logp):
        return jnp.exp(beta1 * logp) * (-jnp.expm1(logp)) ** beta2

    return _weighted("satimp", logps, where, weight)


def _weighted(owner, logps, where, weight):
    """weight(logps) * logps with no gradient through the weight."""
    _checks.mask(owner, where, logps=logps)
    logps = at_least_float32(logps)
    if where is not None:
        logps = jnp.where(where, logps, 0.0)
    fixed = jax.lax.stop_gradient(weight(jnp.minimum(logps, 0.0)))
    loss = fixed * logps
    return loss if where is None else jnp.where(where, loss, 0.0)
