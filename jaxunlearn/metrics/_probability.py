# SPDX-License-Identifier: Apache-2.0
"""Probability of an answer, alone and relative to wrong answers.

They are computed from the log-probabilities of the answer's tokens, which
`losses.token_logps` or `terms.target_logps` gives: first `mean_nll`, then
`probability`, `probability_with_options` or `truth_ratio`.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array

MEANS = ("geometric", "arithmetic")
BETTER = ("closer_to_1_better", "true_better")


def mean_nll(
    logps: Array, *, where: Array | None = None, lengths: Array | None = None
) -> Array:
    """Mean negative log-probability of an answer's tokens: -sum(logps) / count.

    Args:
        logps: [..., L] float, log-probability of each token, nats.
        where: [..., L] bool, True where the token belongs to the answer; None counts
            all. Values elsewhere have no effect, NaN included.
        lengths: [...] counts to divide by instead of those of `where`.
    Returns:
        [...] float32, nats per token; NaN if a row has no token.
    Raises:
        ValueError: if where or lengths have another shape. TypeError: if where is not
            boolean.
    Paper and code: OpenUnlearning divides by the number of labels, which is one more
        than the number of tokens summed if position 0 is labelled. Pass that number as
        lengths to reproduce it.
    """
    _checks.mask("mean_nll", where, logps=logps)
    logps = _precision.at_least_float32(logps)
    where = _common.counted(logps, where)
    count = where.sum(-1) if lengths is None else jnp.asarray(lengths)
    total = jnp.where(where, logps, 0.0).sum(-1)
    _checks.same_shape("mean_nll", lengths=count, rows=total)
    return -total / count.astype(logps.dtype)


def probability(
    logps: Array, *, where: Array | None = None, lengths: Array | None = None
) -> Array:
    """exp(-mean_nll): the geometric mean of an answer's token probabilities.

    Args:
        logps: [..., L] float, log-probability of each token, nats.
        where: [..., L] bool, True where the token belongs to the answer.
        lengths: [...] counts to divide by instead of those of `where`.
    Returns:
        [...] float32 in [0, 1]; NaN if a row has no token.
    Raises:
        ValueError, TypeError: as `mean_nll`.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    return jnp.exp(-mean_nll(logps, where=where, lengths=lengths))


def probability_with_options(
    correct_nll: Array, wrong_nll: Array, *, eps: float = 0.0
) -> Array:
    """Probability of the correct answer, normalised over it and the wrong options.

    Computes p / (p + sum_k q_k + eps) with p = exp(-correct_nll), q = exp(-wrong_nll).

    Args:
        correct_nll: [...] float, `mean_nll` of the correct answer, nats per token.
        wrong_nll: [..., K] float, `mean_nll` of the wrong options.
        eps: added to the denominator. OpenUnlearning uses 1e-10; a collapsed model,
            whose probabilities all vanish, then gets 0.
    Returns:
        [...] float32 in [0, 1].
    Raises:
        ValueError: if eps < 0, the leading axes differ or there is no option.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    name = "probability_with_options"
    correct, wrong = _pair(name, correct_nll, wrong_nll, eps)
    if eps:
        right = jnp.exp(-correct)
        return right / (right + jnp.exp(-wrong).sum(-1) + eps)
    scores = -jnp.concatenate([correct[..., None], wrong], axis=-1)
    return jax.nn.softmax(scores, axis=-1)[..., 0]


def truth_ratio(
    correct_nll: Array, wrong_nll: Array, *, mean: str = "geometric", eps: float = 0.0
) -> Array:
    """Truth ratio: probability of wrong answers over that of the correct one.

    Computes w / (c + eps), where c = exp(-correct_nll) and w is the mean of
    exp(-wrong_nll) over K wrong answers. It is near 1 for a model without the knowledge
    and near 0 for one with it; there is no upper bound. For rows of the forget and the
    retain set use the paraphrased answer as the correct one, so that verbatim
    memorisation has no effect.

    Args:
        correct_nll: [...] float, `mean_nll` of the correct answer, nats per token.
        wrong_nll: [..., K] float, `mean_nll` of the wrong answers.
        mean: over the wrong answers; "geometric", exp(-mean_k wrong_nll), or
            "arithmetic".
        eps: added to c. With 0 the ratio is one exp of a difference, which is exact
            even if both probabilities underflow.
    Returns:
        [...] float32, >= 0.
    Raises:
        ValueError: if mean is unknown, eps < 0, the leading axes differ or there is no
            wrong answer.
    Paper and code: OpenUnlearning uses the geometric mean and eps=1e-10. TOFU's code
        logs the inverse of the geometric version and aggregates the arithmetic one.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    correct, wrong = _pair("truth_ratio", correct_nll, wrong_nll, eps)
    mean_wrong_nll = _mean_wrong("truth_ratio", wrong, mean)
    if eps:
        return jnp.exp(-mean_wrong_nll) / (jnp.exp(-correct) + eps)
    return jnp.exp(correct - mean_wrong_nll)


def truth_probability(
    correct_nll: Array, wrong_nll: Array, *, mean: str = "geometric", eps: float = 0.0
) -> Array:
    """Truth ratio as a probability, c / (c + w + eps) (OpenUnlearning's prob_mean).

    Args, Raises: as `truth_ratio`.
    Returns:
        [...] float32 in [0, 1]; 1/2 for a model without the knowledge.
    """
    correct, wrong = _pair("truth_probability", correct_nll, wrong_nll, eps)
    mean_wrong_nll = _mean_wrong("truth_probability", wrong, mean)
    if eps:
        right = jnp.exp(-correct)
        return right / (right + jnp.exp(-mean_wrong_nll) + eps)
    return jax.nn.sigmoid(mean_wrong_nll - correct)


def truth_score(ratio: Array, *, better: str, eps: float = 0.0) -> Array:
    """Score in [0, 1] of a truth ratio R, where 1 is best; average it over rows.

    "closer_to_1_better" is min(R, 1 / (R + eps)), for the forget set: best if no answer
    is preferred. "true_better" is max(0, 1 - R), for all other sets: best if the
    correct answer is preferred.

    Args:
        ratio: [...] float, `truth_ratio`.
        better: "closer_to_1_better" or "true_better".
        eps: OpenUnlearning uses 1e-10.
    Returns:
        [...] float32 in [0, 1].
    Raises:
        ValueError: if better is unknown or eps < 0.
    """
    _checks.one_of("truth_score", BETTER, better=better)
    _checks.not_negative("truth_score", eps=eps)
    ratio = _precision.at_least_float32(ratio)
    if better == "true_better":
        return jnp.maximum(1.0 - ratio, 0.0)
    return jnp.minimum(ratio, 1.0 / (ratio + eps))


def _pair(owner, correct_nll, wrong_nll, eps):
    _checks.not_negative(owner, eps=eps)
    correct, wrong = map(_precision.at_least_float32, (correct_nll, wrong_nll))
    if not wrong.ndim or not wrong.shape[-1]:
        raise ValueError(
            f"{owner} needs wrong_nll [..., K] with K >= 1 wrong answers, got shape "
            f"{wrong.shape}."
        )
    _checks.same_shape(
        owner, correct_nll=correct, **{"wrong_nll[..., 0]": wrong[..., 0]}
    )
    return correct, wrong


def _mean_wrong(owner, wrong, mean):
    """-log of the mean probability of the K wrong answers."""
    _checks.one_of(owner, MEANS, mean=mean)
    if mean == "geometric":
        return wrong.mean(-1)
    count = jnp.log(jnp.asarray(wrong.shape[-1], wrong.dtype))
    return count - jax.nn.logsumexp(-wrong, axis=-1)
