# SPDX-License-Identifier: Apache-2.0
"""Preference losses: NPO, SimNPO, and DPO, which also takes a preferred answer.

Each lowers the log-probability of a forget answer with a gradient that vanishes as the
log-probability falls; the gradient of plain ascent does not. To bind a loss, use
`terms.on_logps(partial(losses.npo, beta=0.1), model, "forget")`.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.losses._common import masked
from jaxunlearn.typing import Array


def npo(
    logps: Array, ref_logps: Array, *, beta: float = 0.1, where: Array | None = None
) -> Array:
    """Negative preference optimisation: lowers forget answers below the reference.

    Computes (2 / beta) * log(1 + (pi / pi_ref) ** beta), the NPO loss of Zhang et al.
    2024. At the reference its value is 2 ln 2 / beta and its gradient is that of
    `ascent`. As beta tends to 0, the gradient tends to that of `ascent` everywhere. The
    loss is finite and its gradient is in [0, 2] for all finite log-probabilities.

    Args:
        logps: [...] float, log-probability of each answer under the model, summed over
            its tokens, nats.
        ref_logps: [...] float, the same under the reference. No gradient flows through
            it.
        beta: inverse temperature, > 0.
        where: [...] bool, True where the row counts (False for rows that only fill a
            batch).
    Returns:
        [...] float32, one value per answer, 0 where masked; reduce outside.
    Raises:
        ValueError: if beta <= 0 or the shapes differ.
    Paper and code: the log-probabilities are sums over answer tokens, and the loss is
        taken per answer. MUSE's released code applies the formula to raw logits
        (`npo_logits`); BLUR's TOFU code averages the log-probabilities over the batch
        first (pass that mean as a [1] array).
    References: https://arxiv.org/abs/2404.05868
    """
    _checks.positive("npo", beta=beta)
    _checks.same_shape("npo", logps=logps, ref_logps=ref_logps)
    _checks.mask("npo", where, logps=logps)
    ratio = _difference(logps, jax.lax.stop_gradient(ref_logps), where)
    loss = -(2.0 / beta) * jax.nn.log_sigmoid(-beta * ratio)
    return masked(loss, where)


def simnpo(
    logps: Array,
    lengths: Array,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    where: Array | None = None,
) -> Array:
    """SimNPO: NPO without a reference, on the mean log-probability per token.

    Computes -(2 / beta) * log sigmoid(beta * (-logps / lengths - delta)), the SimNPO
    loss of Fan et al. 2024. As in OpenUnlearning, beta multiplies the margin delta too.

    Args:
        logps: [...] float, log-probability of each answer, summed over its tokens,
            nats.
        lengths: [...] int or float, number of tokens summed; 0 is replaced by 1.
        beta: inverse temperature, > 0.
        delta: margin in nats per token; an answer whose NLL per token is below it
            counts as still remembered.
        where: [...] bool, True where the row counts (False for rows that only fill a
            batch).
    Returns:
        [...] float32, one value per answer, 0 where masked; reduce outside.
    Raises:
        ValueError: if beta <= 0, delta is not finite, or the shapes differ.
    Paper and code: OpenUnlearning divides by the number of labelled tokens, which is
        one more than the number of tokens summed if position 0 is labelled. Pass that
        number as `lengths` to reproduce it.
    References: https://arxiv.org/abs/2410.07163
    """
    _checks.positive("simnpo", beta=beta)
    _checks.finite("simnpo", delta=delta)
    _checks.same_shape("simnpo", logps=logps, lengths=lengths)
    _checks.mask("simnpo", where, logps=logps)
    logps = _precision.at_least_float32(logps)
    lengths = jnp.asarray(lengths).astype(logps.dtype)
    if where is not None:
        logps = jnp.where(where, logps, 0.0)
        lengths = jnp.where(where, lengths, 1.0)
    per_token = logps / jnp.maximum(lengths, 1.0)
    loss = -(2.0 / beta) * jax.nn.log_sigmoid(-beta * (per_token + delta))
    return masked(loss, where)


def dpo(
    logps: Array,
    ref_logps: Array,
    lose_logps: Array | None = None,
    lose_ref_logps: Array | None = None,
    *,
    beta: float = 0.1,
    where: Array | None = None,
    compat: str | None = None,
) -> Array:
    """Direct preference optimisation: prefers another answer to the forget answer.

    Computes -log sigmoid(beta * ((logps - ref_logps) - (lose_logps - lose_ref_logps))),
    Eq. 7 of Rafailov et al. 2023. In unlearning the losing answer is the one to forget,
    and the winning answer is a refusal (IdkDPO) or another plausible answer (AltPO).
    Without a losing answer the loss only raises the winner's ratio; for a losing answer
    alone use `npo`.

    Args:
        logps: [...] float, log-probability of each preferred answer under the model,
            summed over its tokens, nats.
        ref_logps: [...] float, the same under the reference. No gradient flows through
            it.
        lose_logps: [...] float, of each answer to forget, under the model.
        lose_ref_logps: [...] float, the same under the reference. No gradient flows
            through it.
        beta: inverse temperature, > 0.
        where: [...] bool, True where the row counts.
        compat: "openunlearning" multiplies the loss by 2 / beta.
    Returns:
        [...] float32, one value per pair, 0 where masked; reduce outside.
    Raises:
        ValueError: if beta <= 0, the shapes differ, compat is unknown, or only one of
            lose_logps and lose_ref_logps is given.
    Paper and code: OpenUnlearning's DPO, IdkDPO and AltPO multiply by 2 / beta as NPO
        does; the paper does not.
    References: https://arxiv.org/abs/2305.18290 (DPO),
        https://arxiv.org/abs/2409.13474 (AltPO)
    """
    _checks.positive("dpo", beta=beta)
    _checks.one_of("dpo", (None, "openunlearning"), compat=compat)
    if (lose_logps is None) != (lose_ref_logps is None):
        raise ValueError(
            "dpo needs both lose_logps and lose_ref_logps, or neither, got only one. "
            "Pass the other one too."
        )
    pairs = {"logps": logps, "ref_logps": ref_logps}
    pairs |= {"lose_logps": lose_logps, "lose_ref_logps": lose_ref_logps}
    _checks.same_shape("dpo", **pairs)
    _checks.mask("dpo", where, logps=logps)
    margin = _difference(logps, jax.lax.stop_gradient(ref_logps), where)
    if lose_logps is not None:
        lose = _difference(lose_logps, jax.lax.stop_gradient(lose_ref_logps), where)
        margin = margin - lose.astype(margin.dtype)
    loss = -jax.nn.log_sigmoid(beta * margin)
    loss = loss if compat is None else (2.0 / beta) * loss
    return masked(loss, where)


def npo_logits(
    logits: Array,
    ref_logits: Array,
    *,
    beta: float = 0.1,
    where: Array | None = None,
) -> Array:
    """The NPO formula applied to each raw logit, as in the released MUSE code.

    Computes the mean over V of -(2 / beta) * log sigmoid(beta * (ref_logits - logits)).
    It uses no targets: at the reference its gradient is the same for every logit, and
    the softmax does not change in that direction. Use it only to reproduce published
    numbers, and `npo` otherwise. Entries that one of the two masks (logit -inf) count
    as equal.

    Args:
        logits: [..., V] float.
        ref_logits: [..., V] float. No gradient flows through it.
        beta: inverse temperature, > 0.
        where: [...] bool, True where the position counts; None counts all, as MUSE's
            code does.
    Returns:
        [...] float32, 0 where masked; MUSE's loss is the mean over all positions.
    Raises:
        ValueError: if beta <= 0 or the shapes differ.
    Paper and code: the code of MUSE and of BLUR's MUSE runs computes this; the papers
        print `npo`.
    References: https://arxiv.org/abs/2407.06460 (MUSE),
        https://arxiv.org/abs/2506.08164 (BLUR)
    """
    _checks.positive("npo_logits", beta=beta)
    _checks.same_shape("npo_logits", logits=logits, ref_logits=ref_logits)
    _checks.mask("npo_logits", where, logits=logits[..., 0])
    ref_logits = jax.lax.stop_gradient(ref_logits)
    possible = (logits != -jnp.inf) & (ref_logits != -jnp.inf)
    entries = possible if where is None else possible & where[..., None]
    gap = _difference(logits, ref_logits, entries)
    loss = jnp.mean(-(2.0 / beta) * jax.nn.log_sigmoid(-beta * gap), axis=-1)
    return masked(loss, where)


def _difference(x: Array, ref: Array, where: Array | None) -> Array:
    """x - ref, in float32 at least; 0 where masked, so that NaN reaches no gradient.

    It is also 0 where both are -inf, of probability 0.
    """
    x = _precision.at_least_float32(x)
    ref = _precision.at_least_float32(ref).astype(x.dtype)
    counts = (x != -jnp.inf) | (ref != -jnp.inf)
    counts = counts if where is None else where & counts
    return jnp.where(counts, x, 0.0) - jnp.where(counts, ref, 0.0)
