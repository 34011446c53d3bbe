# SPDX-License-Identifier: Apache-2.0
"""Memorisation: how much of an answer greedy decoding reproduces verbatim.

Both metrics are computed from `greedy_hits`: whether each token is the most likely one
given the correct tokens before it. If all tokens of a row are, greedy decoding writes
the row.
"""

import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array

COMPATS = (None, "openunlearning")


def greedy_hits(logits: Array, targets: Array) -> Array:
    """Whether each target is the most likely token.

    Args:
        logits: [..., V] float; for token t of a text, pass the logits at t - 1.
        targets: [...] int.
    Returns:
        [...] bool; ties choose the first token; False if a logit is NaN.
    Raises:
        ValueError: if targets do not have the leading shape of logits.
    """
    _checks.same_shape("greedy_hits", logits=logits[..., 0], targets=targets)
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    # Two reductions, because jnp.argmax is not vectorised on CPUs. With a NaN the
    # maximum is NaN, which equals no logit.
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(logits == best, jnp.arange(size, dtype=targets.dtype), size)
    first = jnp.min(index, axis=-1)
    return (first == targets) & (first < size)


def drop_last(where: Array) -> Array:
    """The mask without the last True of every row, which is often the end token.

    OpenUnlearning drops it in exact memorisation, extraction strength, Min-K and
    GradNorm. In texts without an end token this drops a real token, and a row of one
    token becomes empty.

    Args:
        where: [..., L] bool.
    Returns:
        [..., L] bool.
    Raises:
        TypeError: if where is not boolean.
    """
    _checks.mask("drop_last", where)
    where = jnp.asarray(where)
    after = jnp.cumsum(where[..., ::-1], axis=-1)[..., ::-1]
    return where & (after > 1)


def exact_memorization(hits: Array, *, where: Array | None = None) -> Array:
    """Fraction of an answer's tokens that are greedy hits.

    Args:
        hits: [..., L] bool, `greedy_hits`.
        where: [..., L] bool, True where the token counts; None counts all.
    Returns:
        [...] float32 in [0, 1]; NaN if a row has no token. OpenUnlearning skips such
        rows in the mean: `mean(values, missing="skip")`.
    Raises:
        ValueError: if the shapes differ. TypeError: if where is not boolean.
    References: Tirumala et al. 2022, https://arxiv.org/abs/2205.10770
    """
    _checks.mask("exact_memorization", where, hits=hits)
    where = _common.counted(hits, where)
    return _share(where & hits, where)


def extraction_strength(
    hits: Array, *, where: Array | None = None, compat: str | None = None
) -> Array:
    """Fraction of an answer that greedy decoding completes, given what precedes it.

    Computes 1 - k / n, where n is the number of tokens that count, and k is the
    smallest index from which all tokens to the end are hits. It is 0 if the last token
    is not a hit, and 1 if all tokens are.

    Args:
        hits: [..., L] bool, `greedy_hits`.
        where: [..., L] bool, True where the token counts; None counts all.
        compat: "openunlearning" limits k to n - 1 as that code does: a row without hits
            gets 1 / n, an answer of one token always gets 1, and a row without tokens
            gets 0.
    Returns:
        [...] float32 in [0, 1]; NaN if a row has no token.
    Raises:
        ValueError: if the shapes differ or compat is unknown. TypeError: if where is
            not boolean.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.mask("extraction_strength", where, hits=hits)
    _checks.one_of("extraction_strength", COMPATS, compat=compat)
    where = _common.counted(hits, where)
    misses = jnp.cumsum((where & ~hits)[..., ::-1], axis=-1)[..., ::-1]
    tail = where & (misses == 0)
    if compat is None:
        return _share(tail, where)
    last = where & ~drop_last(where)
    return jnp.where(where.any(-1), _share(tail | last, where), 0.0)


def _share(part, whole):
    return part.sum(-1).astype(jnp.float32) / whole.sum(-1).astype(jnp.float32)
