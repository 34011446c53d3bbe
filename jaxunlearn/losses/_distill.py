# SPDX-License-Identifier: Apache-2.0
"""Losses on whole distributions over the vocabulary: stay near a reference's, move to
one in which the target is less likely, or flatten."""

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
    log_p, log_q = _pair("kl", logits, ref_logits, where)
    if normalise:
        log_p, log_q = jax.nn.log_softmax(log_p), jax.nn.log_softmax(log_q)
    weigher, other = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    loss = _divergence(weigher, other)
    return loss if where is None else jnp.where(where, loss, 0.0)


def kl_uniform(
    logits: Array, *, where: Array | None = None, direction: str = "forward"
) -> Array:
    """`kl` to the uniform distribution u: towards knowing nothing about a position.

    "forward" computes KL(u || p) = -mean_v log p - ln V, which is not bounded above;
    "reverse" computes KL(p || u) = ln V minus the entropy of p, between 0 and ln V.

    Args:
        logits: [..., V] float, the model.
        where: [...] bool, True where the position counts; None counts all.
        direction: "forward" or "reverse".
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if where has another shape or the direction is unknown.
    """
    return kl(logits, jnp.zeros_like(logits), where=where, direction=direction)


def js(logits: Array, ref_logits: Array, *, where: Array | None = None) -> Array:
    """Jensen-Shannon divergence between a model and a reference, at each position.

    With m = (p + q) / 2 it is (KL(p || m) + KL(q || m)) / 2: symmetric, between 0 and
    ln 2.

    Args:
        logits: [..., V] float, the model.
        ref_logits: [..., V] float, the reference. No gradient flows through it. Zeros
            stand for the uniform distribution, here and in `kl`.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ.
    References: Lin 1991, https://doi.org/10.1109/18.61115
    """
    log_p, log_q = _log_softmaxes("js", logits, ref_logits, where)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0).astype(log_p.dtype)
    loss = 0.5 * (_divergence(log_p, log_m) + _divergence(log_q, log_m))
    return loss if where is None else jnp.where(where, loss, 0.0)


def undial(
    logits: Array,
    ref_logits: Array,
    targets: Array,
    *,
    beta: float = 10.0,
    where: Array | None = None,
) -> Array:
    """UNDIAL: distil from a reference whose logit of the target was lowered.

    Computes the cross-entropy from softmax(ref_logits - beta * onehot(targets)) to the
    model, at each position. Unlike ascent it has a minimum, so the model stays whole.

    Args:
        logits: [..., V] float, the model.
        ref_logits: [..., V] float, the model before unlearning. No gradient.
        targets: [...] int, the token to be made less likely; one outside [0, V) lowers
            nothing.
        beta: by how much its logit is lowered, > 0, nats.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if beta <= 0 or the shapes differ.
    Paper and code: OpenUnlearning averages over prompt and padding too, where label
        -100 lowers vocabulary entry V - 100.
    References: https://arxiv.org/abs/2402.10052
    """
    _checks.positive("undial", beta=beta)
    _checks.same_shape("undial", logits=logits[..., 0], targets=targets)
    log_p, ref = _pair("undial", logits, ref_logits, where)
    lowered = ref - beta * jax.nn.one_hot(targets, ref.shape[-1], dtype=ref.dtype)
    teacher = jax.nn.softmax(lowered)
    loss = -jnp.sum(teacher * jax.nn.log_softmax(log_p), axis=-1)
    return loss if where is None else jnp.where(where, loss, 0.0)


def ce_u(logits: Array, targets: Array, *, where: Array | None = None) -> Array:
    """CE-U: move to the model's own distribution with the target taken out of it.

    Computes the cross-entropy from softmax(logits with the target's at -inf), held
    fixed, to the model. Its gradient for the logits is p - q: bounded, and zero once
    the target has no probability left. It needs no reference.

    Args:
        logits: [..., V] float, the model; V >= 2.
        targets: [...] int, in [0, V), the token to be forgotten.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ.
    Paper and code: OpenUnlearning leaves out the first answer token of each row; say so
        in `where`.
    References: https://arxiv.org/abs/2503.01224
    """
    _checks.same_shape("ce_u", logits=logits[..., 0], targets=targets)
    _checks.mask("ce_u", where, targets=targets)
    logits = at_least_float32(logits)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
    taken = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.bool_)
    teacher = jax.nn.softmax(jnp.where(taken, -jnp.inf, jax.lax.stop_gradient(logits)))
    loss = -jnp.sum(teacher * jax.nn.log_softmax(logits), axis=-1)
    return loss if where is None else jnp.where(where, loss, 0.0)


def complementary_ce(
    logits: Array, targets: Array, *, where: Array | None = None
) -> Array:
    """Cross-entropy from all classes but the target, alike likely, to the model.

    Computes -1/(V - 1) sum over v != target of log p_v: the soft form of a label that
    is turned round ("not this one"). Its least value is ln(V - 1).

    Args:
        logits: [..., V] float, the model; V >= 2.
        targets: [...] int, in [0, V), the class to be made less likely.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ.
    """
    _checks.same_shape("complementary_ce", logits=logits[..., 0], targets=targets)
    _checks.mask("complementary_ce", where, targets=targets)
    logits = at_least_float32(logits)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
    others = 1 - jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    total = jnp.sum(others * jax.nn.log_softmax(logits), axis=-1)
    loss = -total / (logits.shape[-1] - 1)
    return loss if where is None else jnp.where(where, loss, 0.0)


def logit_margin(logits: Array, *, where: Array | None = None) -> Array:
    """Logit-margin flattening, the forget loss of PDU: (max_v z - mean_v z)^2.

    Bounded below by 0, where all tokens are equally likely; convex in the logits.

    Args:
        logits: [..., V] float, the model.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, squared nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if where has another shape.
    Paper and code: OpenUnlearning masks position t by the label of t, not of t + 1.
    References: https://arxiv.org/abs/2506.05314
    """
    _checks.mask("logit_margin", where, logits=logits[..., 0])
    logits = at_least_float32(logits)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
    return (jnp.max(logits, axis=-1) - jnp.mean(logits, axis=-1)) ** 2


def _pair(owner, logits, ref_logits, where):
    """Both in one precision, 0 where masked, no gradient to the reference."""
    _checks.same_shape(owner, logits=logits, ref_logits=ref_logits)
    _checks.mask(owner, where, logits=logits[..., 0])
    p = at_least_float32(logits)
    q = at_least_float32(jax.lax.stop_gradient(ref_logits)).astype(p.dtype)
    if where is not None:
        p = jnp.where(where[..., None], p, 0.0)
        q = jnp.where(where[..., None], q, 0.0)
    return p, q


def _log_softmaxes(owner, logits, ref_logits, where):
    p, q = _pair(owner, logits, ref_logits, where)
    return jax.nn.log_softmax(p), jax.nn.log_softmax(q)


def _divergence(weigher, other):
    """sum_v exp(weigher) (weigher - other); entries of probability 0 add 0."""
    possible = weigher > -jnp.inf
    gap = jnp.where(possible, weigher, 0.0) - jnp.where(possible, other, 0.0)
    return jnp.sum(jnp.exp(weigher) * gap, axis=-1)
