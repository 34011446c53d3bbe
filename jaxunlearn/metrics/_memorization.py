# SPDX-License-Identifier: Apache-2.0
"""How much of an answer comes back word by word under greedy decoding.

Both metrics read `greedy_hits`: with the right tokens before it, is each token the
likeliest? A row whose tokens all are is one that greedy decoding would write.
"""

import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array

COMPATS = (None, "openunlearning")


def greedy_hits(logits: Array, targets: Array) -> Array:
    """Whether each target is the likeliest token.

    Args:
        logits: [..., V] float; to judge token t of a text, pass those at t - 1.
        targets: [...] int.
    Returns:
        [...] bool; of equal logits the first counts, and NaN hits nothing.
    Raises:
        ValueError: if targets do not have the leading shape of logits.
    """
    _checks.same_shape("greedy_hits", logits=logits[..., 0], targets=targets)
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    # In two passes, as CPUs run jnp.argmax one number after the other. A NaN is the
    # largest and equals nothing.
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(logits == best, jnp.arange(size, dtype=targets.dtype), size)
    first = jnp.min(index, axis=-1)
    return (first == targets) & (first < size)


def drop_last(where: Array) -> Array:
    """The mask without the last True of every row, where often the end token is.

    OpenUnlearning leaves it out of exact memorisation, extraction strength, Min-K and
    GradNorm. In texts without an end token a real one is lost, and a row of one token
    has none left.

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
    """Share of an answer's tokens that greedy decoding gets right.

    Args:
        hits: [..., L] bool, `greedy_hits`.
        where: [..., L] bool, True where the token counts; None counts all.
    Returns:
        [...] float32 in [0, 1]; NaN where a row has no token. OpenUnlearning skips
        those in the mean: `mean(values, missing="skip")`.
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
    """Share of an answer that greedy decoding completes, given what is before it.

    Computes 1 - k / n, where n tokens count and k is the smallest start from which all
    of them to the end are hits. 0 if even the last is wrong, 1 if all are right.

    Args:
        hits: [..., L] bool, `greedy_hits`.
        where: [..., L] bool, True where the token counts; None counts all.
        compat: "openunlearning" for that code's floor: k is at most n - 1, so a row
            that never hits gets 1 / n and an answer of one token always gets 1; a row
            without tokens gets 0.
    Returns:
        [...] float32 in [0, 1]; NaN where a row has no token.
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
