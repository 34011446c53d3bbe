# SPDX-License-Identifier: Apache-2.0
"""Accuracy of multiple choice, and the probability of a class."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
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
    """Whether the option with the highest score is the correct one.

    Args:
        scores: [n, K] float, the log-probability or logit of each option.
        labels: [n] int, the correct option, in [0, K).
        lengths: [n, K] numbers that the scores are divided by (tokens or bytes of each
            option), so that long options are not at a disadvantage.
        calibrated: subtract the mean over the n questions from the score of each option
            (column), which removes a bias for a letter. Only for options that are the
            same in every question, such as A to D.
        where: [n, K] bool, True where the option exists; None means all do.
    Returns:
        [n] float32, 1 or 0; ties choose the first option. 0 where several options tie
        at an infinite score, which ranks nothing. NaN where the label is not an option
        or a score is NaN (calibrated: or a mean is not finite). Average with `mean`.
    Raises:
        ValueError: if the shapes do not match or there is no question or option.
            TypeError: if where is not boolean.
    References: calibration as in Deeb and Roger 2024, https://arxiv.org/abs/2410.08827
    """
    name = "choice_accuracy"
    scores = _precision.at_least_float32(scores)
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
        means = scores.sum(0) / count
        scores = scores - jnp.where(jnp.isfinite(means), means, jnp.nan)
    options = jnp.arange(scores.shape[1], dtype=jnp.int32) == labels[:, None]
    valid = (options & where).any(1)
    broken = (where & jnp.isnan(scores)).any(1)
    ranked = jnp.where(where, scores, -jnp.inf)
    best, largest = jnp.argmax(ranked, axis=1), jnp.max(ranked, axis=1, keepdims=True)
    tied = ((ranked == largest) & where).sum(1) > 1
    right = (best.astype(jnp.int32) == labels) & ~(tied & jnp.isinf(largest[:, 0]))
    right = right.astype(jnp.float32)
    return jnp.where(valid & ~broken, right, jnp.nan)


def class_probability(logits: Array, class_id: int) -> Array:
    """Softmax probability of one class, such as that of a gibberish classifier.

    Args:
        logits: [..., C] float.
        class_id: in [0, C).
    Returns:
        [...] float32 in [0, 1].
    Raises:
        ValueError: if class_id is outside [0, C).
    """
    logits = _precision.at_least_float32(logits)
    if not logits.ndim or not 0 <= class_id < logits.shape[-1]:
        raise ValueError(
            f"class_probability needs logits [..., C] and class_id in [0, C), got "
            f"class_id={class_id} and shape {logits.shape}."
        )
    return jax.nn.softmax(logits, axis=-1)[..., class_id]
