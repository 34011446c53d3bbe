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


def js_target(logps: Array, *, where: Array | None = None) -> Array:
    """Jensen-Shannon divergence between the model and certainty of the target.

    With q the model's probability of the target token and e the distribution that has
    all its mass there, a function of q alone:

        JS(p, e) = ln 2 + (q ln q - (1 + q) ln(1 + q)) / 2

    It falls from ln 2 at q = 0 to 0 at q = 1. JensUn unlearns with it: the targets
    are those of a refusal ("No idea"), and the loss cannot diverge, nor can its
    gradient, which is q ln(q / (1 + q)) / 2 with respect to ln q.

    Args:
        logps: [...] float, log-probability of each target token, nats. Values above 0
            count as 0.
        where: [...] bool, True where the entry counts; None counts all.
    Returns:
        [...] float32, nats, in [0, ln 2], 0 where masked; reduce outside.
    Raises:
        ValueError: if where has another shape. TypeError: if it is not boolean.
    References: https://arxiv.org/abs/2509.02820
    """
    _checks.mask("js_target", where, logps=logps)
    logps = masked(_precision.at_least_float32(logps), where)
    logps = jnp.where(logps > 0, jnp.zeros_like(logps), logps)
    # exp is 0 there, and its product with -inf would not be a number.
    logps = jnp.where(logps < -200, jnp.full_like(logps, -200), logps)
    q = jnp.exp(logps)
    ln2 = jnp.log(jnp.asarray(2, logps.dtype))
    return masked(ln2 + 0.5 * (q * logps - (1 + q) * jnp.log1p(q)), where)
