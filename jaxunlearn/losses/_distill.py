# SPDX-License-Identifier: Apache-2.0
"""Distillation losses: stay near a reference's whole distribution over the
vocabulary."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.losses._likelihood import at_least_float32
from jaxunlearn.typing import Array


def kl(
    logits: Array,
    ref_logits: Array,
    *,
    where: Array | None = None,
    direction: str = "forward",
    normalise: bool = True,
) -> Array:
    """Kullback-Leibler divergence between a model and a reference, at each position.

    With p the model and q the reference, "forward" computes KL(q || p) = sum_v q (log q
    - log p) and "reverse" computes KL(p || q) = sum_v p (log p - log q). Both are 0
    with zero gradient at the reference. A vocabulary entry of probability 0 under the
    weighing distribution adds 0, also where its logit is -inf.

    Args:
        logits: [..., V] float, the model.
        ref_logits: [..., V] float, the reference. No gradient flows through it.
        where: [...] bool, True where the position counts; None counts all.
        direction: "forward" (mass-covering) or "reverse" (mode-seeking).
        normalise: take the log-softmax of both. False reads the logits as if they were
            log-probabilities: no longer a divergence, unbounded below.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ or the direction is unknown.
    Paper and code: OpenUnlearning's retain KL is the forward form averaged over every
        position, padding too. The released MUSE code, and BLUR's copy of it, is
        normalise=False summed over positions and divided by B.
    """
    _checks.one_of("kl", ("forward", "reverse"), direction=direction)
    _checks.same_shape("kl", logits=logits, ref_logits=ref_logits)
    _checks.mask("kl", where, logits=logits[..., 0])
    log_p = at_least_float32(logits)
    log_q = at_least_float32(jax.lax.stop_gradient(ref_logits)).astype(log_p.dtype)
    if where is not None:
        log_p = jnp.where(where[..., None], log_p, 0.0)
        log_q = jnp.where(where[..., None], log_q, 0.0)
    if normalise:
        log_p, log_q = jax.nn.log_softmax(log_p), jax.nn.log_softmax(log_q)
    weigher, other = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    possible = weigher > -jnp.inf
    gap = jnp.where(possible, weigher, 0.0) - jnp.where(possible, other, 0.0)
    loss = jnp.sum(jnp.exp(weigher) * gap, axis=-1)
    return loss if where is None else jnp.where(where, loss, 0.0)
