# SPDX-License-Identifier: Apache-2.0
"""Losses on full distributions over the vocabulary.

They keep the model near a reference (`kl`, `js`), move it to a distribution in which
the target is less likely (`undial`, `ce_u`, `complementary_ce`), or flatten it
(`kl_uniform`, `logit_margin`).

A logit of -inf masks an entry of the vocabulary: it has probability 0 and never gets a
gradient. All losses here and their gradients stay finite with such logits, as long as
one entry has a finite logit in all arguments (for `ce_u`, not even then).
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.losses._common import masked
from jaxunlearn.typing import Array


def kl(
    logits: Array,
    ref_logits: Array,
    *,
    where: Array | None = None,
    direction: str = "forward",
    normalize: bool = True,
) -> Array:
    """Kullback-Leibler divergence between a model and a reference, at each position.

    With p the model and q the reference, "forward" computes KL(q || p) = sum_v q (log q
    - log p) and "reverse" computes KL(p || q) = sum_v p (log p - log q). Both are 0
    with zero gradient at the reference. An entry that is masked (logit -inf) in the
    weighting distribution (q forward, p reverse) adds 0. An entry that is masked in the
    other one alone would make the value infinite: the weighting distribution is then
    taken without it, renormalised over the other entries.

    Args:
        logits: [..., V] float, the model.
        ref_logits: [..., V] float, the reference. No gradient flows through it.
        where: [...] bool, True where the position counts; None counts all.
        direction: "forward" (mass-covering) or "reverse" (mode-seeking).
        normalize: apply log-softmax to both. With False the logits are used as
            log-probabilities; the result is not a divergence and is unbounded below.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ or the direction is unknown.
    Paper and code: OpenUnlearning's retain KL is the forward form averaged over all
        positions, padding included. The released MUSE code, which BLUR copies, uses
        normalize=False, sums over positions and divides by B.
    """
    _checks.one_of("kl", ("forward", "reverse"), direction=direction)
    log_p, log_q = _pair("kl", logits, ref_logits, where)
    weighting, other = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    weighting = jnp.where(other != -jnp.inf, weighting, -jnp.inf)
    if normalize:
        weighting, other = jax.nn.log_softmax(weighting), jax.nn.log_softmax(other)
    loss = _divergence(weighting, other)
    return masked(loss, where)


def kl_uniform(
    logits: Array, *, where: Array | None = None, direction: str = "forward"
) -> Array:
    """Kullback-Leibler divergence between a model and the uniform distribution u.

    "forward" computes KL(u || p) = -mean_v log p - ln V, which is not bounded above;
    "reverse" computes KL(p || u) = ln V minus the entropy of p, between 0 and ln V.
    Both are 0 where the model is maximally uncertain. V and u count the entries that
    are not masked.

    Args:
        logits: [..., V] float, the model.
        where: [...] bool, True where the position counts; None counts all.
        direction: "forward" or "reverse".
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if where has another shape or the direction is unknown.
    """
    _checks.one_of("kl_uniform", ("forward", "reverse"), direction=direction)
    _checks.mask("kl_uniform", where, logits=logits[..., 0])
    logits = _precision.at_least_float32(logits)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
    count = jnp.sum(logits != -jnp.inf, axis=-1, dtype=logits.dtype)
    log_p = _finite_log_softmax(logits)
    if direction == "forward":
        loss = -jnp.sum(log_p, axis=-1) / count - jnp.log(count)
    else:
        loss = jnp.log(count) + jnp.sum(jax.nn.softmax(logits) * log_p, axis=-1)
    return masked(loss, where)


def js(logits: Array, ref_logits: Array, *, where: Array | None = None) -> Array:
    """Jensen-Shannon divergence between a model and a reference, at each position.

    With m = (p + q) / 2 it is (KL(p || m) + KL(q || m)) / 2: symmetric, between 0 and
    ln 2.

    Args:
        logits: [..., V] float, the model.
        ref_logits: [..., V] float, the reference. No gradient flows through it. Zeros
            give the uniform distribution, here and in `kl`.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ.
    References: Lin 1991, https://doi.org/10.1109/18.61115
    """
    log_p, log_q = map(jax.nn.log_softmax, _pair("js", logits, ref_logits, where))
    possible = jnp.maximum(log_p, log_q) != -jnp.inf
    log_m = jnp.logaddexp(
        jnp.where(possible, log_p, 0.0), jnp.where(possible, log_q, 0.0)
    ) - jnp.log(2.0).astype(log_p.dtype)
    loss = 0.5 * (_divergence(log_p, log_m) + _divergence(log_q, log_m))
    return masked(loss, where)


def undial(
    logits: Array,
    ref_logits: Array,
    targets: Array,
    *,
    beta: float = 10.0,
    where: Array | None = None,
) -> Array:
    """UNDIAL: cross-entropy against a reference whose target logit is lowered.

    Computes the cross-entropy between softmax(ref_logits - beta * onehot(targets)) and
    the model at each position. Unlike gradient ascent it has a minimum, so training
    does not diverge. Entries that the model masks have probability 0 in the teacher.

    Args:
        logits: [..., V] float, the model.
        ref_logits: [..., V] float, the original model. No gradient flows through it.
        targets: [...] int, the token to make less likely; a target outside [0, V)
            changes no logit.
        beta: amount by which the target's logit is lowered, > 0, nats.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if beta <= 0 or the shapes differ.
    Paper and code: OpenUnlearning also averages over prompt and padding, where its
        label -100 lowers vocabulary entry V - 100.
    References: https://arxiv.org/abs/2402.10052
    """
    _checks.positive("undial", beta=beta)
    _checks.same_shape("undial", logits=logits[..., 0], targets=targets)
    log_p, ref = _pair("undial", logits, ref_logits, where)
    lowered = ref - beta * jax.nn.one_hot(targets, ref.shape[-1], dtype=ref.dtype)
    teacher = jax.nn.softmax(jnp.where(log_p != -jnp.inf, lowered, -jnp.inf))
    loss = -jnp.sum(teacher * _finite_log_softmax(log_p), axis=-1)
    return masked(loss, where)


def ce_u(logits: Array, targets: Array, *, where: Array | None = None) -> Array:
    """CE-U: cross-entropy against the model's distribution without the target.

    The teacher q is softmax(logits with the target's logit at -inf), with no gradient.
    The gradient with respect to the logits is p - q: it is bounded, and zero once the
    target has probability 0. No reference model is needed.

    Args:
        logits: [..., V] float, the model; V >= 2.
        targets: [...] int, in [0, V), the token to forget.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ.
    Paper and code: OpenUnlearning leaves out the first answer token of each row; set
        `where` to False there to reproduce it.
    References: https://arxiv.org/abs/2503.01224
    """
    logits, targets = _with_targets("ce_u", logits, targets, where)
    target = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.bool_)
    others = jnp.where(target, -jnp.inf, jax.lax.stop_gradient(logits))
    # Where all other entries are masked there is no teacher: the loss is 0.
    any_other = jnp.max(others, axis=-1, keepdims=True) != -jnp.inf
    teacher = jax.nn.softmax(jnp.where(any_other, others, 0.0))
    teacher = jnp.where(any_other, teacher, 0.0)
    loss = -jnp.sum(teacher * _finite_log_softmax(logits), axis=-1)
    return masked(loss, where)


def complementary_ce(
    logits: Array, targets: Array, *, where: Array | None = None
) -> Array:
    """Cross-entropy against the uniform distribution over all non-target classes.

    Computes -1/(V - 1) times the sum of log p_v over v != target: the target serves as
    a complementary label ("not this class"). The minimum is ln(V - 1). V counts the
    classes that are not masked.

    Args:
        logits: [..., V] float, the model; V >= 2.
        targets: [...] int, in [0, V), the class to make less likely.
        where: [...] bool, True where the position counts; None counts all.
    Returns:
        [...] float32, nats, 0 where masked; reduce outside.
    Raises:
        ValueError: if the shapes differ.
    """
    logits, targets = _with_targets("complementary_ce", logits, targets, where)
    target = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.bool_)
    others = (~target & (logits != -jnp.inf)).astype(logits.dtype)
    total = jnp.sum(others * _finite_log_softmax(logits), axis=-1)
    loss = -total / jnp.maximum(jnp.sum(others, axis=-1), 1.0)
    return masked(loss, where)


def logit_margin(logits: Array, *, where: Array | None = None) -> Array:
    """Squared logit margin, the forget loss of PDU: (max_v z - mean_v z)^2.

    It is convex in the logits z, and its minimum 0 is where all tokens are equally
    likely. Masked entries are left out.

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
    logits = _precision.at_least_float32(logits)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
    mean = jnp.mean(logits, axis=-1, where=logits != -jnp.inf)
    return (jnp.max(logits, axis=-1) - mean) ** 2


def _pair(owner, logits, ref_logits, where):
    """(logits, ref_logits) in one dtype, 0 where masked, no gradient to the second."""
    _checks.same_shape(owner, logits=logits, ref_logits=ref_logits)
    _checks.mask(owner, where, logits=logits[..., 0])
    p = _precision.at_least_float32(logits)
    q = _precision.at_least_float32(jax.lax.stop_gradient(ref_logits)).astype(p.dtype)
    if where is not None:
        p = jnp.where(where[..., None], p, 0.0)
        q = jnp.where(where[..., None], q, 0.0)
    return p, q


def _with_targets(owner, logits, targets, where):
    """(logits, targets) checked, in float32 at least, and 0 where masked."""
    _checks.same_shape(owner, logits=logits[..., 0], targets=targets)
    _checks.mask(owner, where, targets=targets)
    logits = _precision.at_least_float32(logits)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
    return logits, targets


def _finite_log_softmax(logits):
    """log_softmax, with 0 in place of -inf."""
    return jnp.where(logits != -jnp.inf, jax.nn.log_softmax(logits), 0.0)


def _divergence(log_p, log_q):
    """KL(p || q) = sum_v p (log p - log q); entries with p = 0 add 0."""
    possible = log_p != -jnp.inf
    gap = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * gap, axis=-1)
