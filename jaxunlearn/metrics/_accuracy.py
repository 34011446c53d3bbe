# SPDX-License-Identifier: Apache-2.0
"""Choices among options and classes."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array


def choice_accuracy(
    scores: Array,
    labels: Array,
    *,
    lengths: Array | None = None,
    calibrated: bool = False,
    where: Array | None = None,
) -> Array:
    """Whether the option that scores highest is the right one.

    Args:
        scores: [n, K] float, the log-probability or logit of each option.
        labels: [n] int, the right option, in [0, K).
        lengths: [n, K] what to divide the scores by first (tokens or bytes of each
            option), so that long options are not at a disadvantage.
        calibrated: take from each option's score its mean over the n questions, so that
            a liking for a letter does not count; the questions need options that mean
            the same, as A to D.
        where: [n, K] bool, True where the option exists; None has all.
    Returns:
        [n] float32, 1 or 0, of equal scores the first counts; NaN where the label is
        not among the options or a score is NaN. Average with `mean`.
    Raises:
        ValueError: if the shapes do not go together or there is no question or option.
            TypeError: if where is not boolean.
    References: calibrated as in Deeb and Roger 2024, https://arxiv.org/abs/2410.08827
    """
    name = "choice_accuracy"
    scores = _common.at_least_float32(scores)
    labels = jnp.asarray(labels).astype(jnp.int32)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"{name} needs scores [n, K] with n and K >= 1, got shape {scores.shape}."
        )
    _checks.same_shape(name, labels=labels, **{"scores[:, 0]": scores[:, 0]})
    _checks.mask(name, where, scores=scores)
    where = _common.counted(scores, where)
    scores = jnp.where(where, scores, 0.0)
    if lengths is not None:
        lengths = jnp.asarray(lengths).astype(scores.dtype)
        _checks.same_shape(name, lengths=lengths, scores=scores)
        scores = scores / jnp.where(where, lengths, 1.0)
    if calibrated:
        count = jnp.maximum(where.sum(0), 1).astype(scores.dtype)
        scores = scores - scores.sum(0) / count
    options = jnp.arange(scores.shape[1], dtype=jnp.int32) == labels[:, None]
    known = (options & where).any(1)
    broken = (where & jnp.isnan(scores)).any(1)
    best = jnp.argmax(jnp.where(where, scores, -jnp.inf), axis=1)
    right = (best.astype(jnp.int32) == labels).astype(jnp.float32)
    return jnp.where(known & ~broken, right, jnp.nan)


def class_probability(logits: Array, class_id: int) -> Array:
    """Softmax probability of one class, as of a classifier of gibberish.

    Args:
        logits: [..., C] float.
        class_id: in [0, C).
    Returns:
        [...] float32 in [0, 1].
    Raises:
        ValueError: if there is no such class.
    """
    logits = _common.at_least_float32(logits)
    if not logits.ndim or not 0 <= class_id < logits.shape[-1]:
        raise ValueError(
            f"class_probability needs class_id among the classes of logits [..., C], "
            f"got class_id={class_id} and shape {logits.shape}."
        )
    return jax.nn.softmax(logits, axis=-1)[..., class_id]
