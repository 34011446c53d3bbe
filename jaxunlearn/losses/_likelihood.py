# SPDX-License-Identifier: Apache-2.0
"""Likelihood losses: raise or lower the log-probability of given tokens.

`token_logps` computes log-probabilities from logits. Minimising `nll` raises them,
minimising `ascent` lowers them. To bind a loss to a model and a stream, use
`terms.on_logps(losses.nll, model, "retain", reduce="token")`.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.losses._common import masked
from jaxunlearn.typing import Array


def token_logps(logits: Array, targets: Array, *, where: Array | None = None) -> Array:
    """Log-probability of each target: logits[target] - logsumexp(logits).

    Only the gathered entry and the normaliser are stored, not the full log-softmax. The
    caller aligns logits and targets: to score token t of a text, pass the logits at
    position t - 1.

    Args:
        logits: [..., V] float of any precision.
        targets: [...] int, in [0, V).
        where: [...] bool, True where the target counts. Elsewhere the value is 0 for
            any logits and target, NaN included.
    Returns:
        [...] float32 (float64 for float64 logits), nats. NaN where a target that counts
        is outside [0, V): mask label -100; it does not wrap to the end of the
        vocabulary.
    Raises:
        ValueError: if targets or where do not have the leading shape of logits.
    """
    _checks.same_shape("token_logps", logits=logits[..., 0], targets=targets)
    _checks.mask("token_logps", where, targets=targets)
    if where is not None:
        logits = jnp.where(where[..., None], logits, jnp.zeros_like(logits))
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
    logits = _precision.at_least_float32(logits)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    index = jnp.where(inside, targets, jnp.full_like(targets, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")
    logps = chosen[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return masked(logps, where)


def nll(logps: Array, *, where: Array | None = None) -> Array:
    """Negative log-likelihood, -logps: the loss for learning and retaining.

    Args:
        logps: [...] float, log-probability of each target (a token or a whole answer),
            nats.
        where: [...] bool, True where the entry counts; None counts all.
    Returns:
        [...] float32, 0 where masked; reduce outside.
    Raises:
        ValueError: if where has another shape. TypeError: if it is not boolean.
    """
    _checks.mask("nll", where, logps=logps)
    return masked(-_precision.at_least_float32(logps), where)


def ascent(
    logps: Array, *, cap: float | None = None, where: Array | None = None
) -> Array:
    """Gradient ascent on the NLL, as a loss to minimise: +logps.

    The loss is unbounded below, so its gradient never vanishes. `npo` saturates
    instead, and `cap` adds a plain bound: max(logps, -cap). The hinge relu(m - NLL) is
    this loss with cap=m, plus m.

    Args:
        logps: [...] float, log-probability of each target (a token or a whole answer),
            nats.
        cap: entries whose NLL exceeds it, in nats, have zero gradient; > 0, None for
            no bound. The NLL of a uniform guess is ln V.
        where: [...] bool, True where the entry counts; None counts all.
    Returns:
        [...] float32, 0 where masked; reduce outside.
    Raises:
        ValueError: if cap <= 0 or where has another shape. TypeError: if it is not
            boolean.
    References: Jang et al. 2022, https://arxiv.org/abs/2210.01504
    """
    _checks.mask("ascent", where, logps=logps)
    loss = _precision.at_least_float32(logps)
    if cap is not None:
        _checks.positive("ascent", cap=cap)
        loss = jnp.maximum(loss, jnp.asarray(-cap, loss.dtype))
    return masked(loss, where)
