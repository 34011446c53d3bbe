# SPDX-License-Identifier: Apache-2.0
"""How likely an answer is, and how much likelier than wrong ones.

A row's number is taken from the log-probabilities of its answer's tokens, which
`losses.token_logps` or a chunked pass of the model gives: `mean_nll` first, then
`probability`, `probability_with_options` or `truth_ratio` of those means.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
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
            all. Elsewhere nothing matters, whatever it holds.
        lengths: [...] the count to divide by in place of that of `where`.
    Returns:
        [...] float32, nats a token; NaN where a row has no token, as nothing was
        measured.
    Raises:
        ValueError: if where or lengths have another shape. TypeError: if where is not
            boolean.
    Paper and code: OpenUnlearning divides by the count of all labels, which is one more
        than the tokens summed where position 0 is labelled. Pass that count as lengths.
    """
    _checks.mask("mean_nll", where, logps=logps)
    logps = _common.at_least_float32(logps)
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
        lengths: [...] the count to divide by in place of that of `where`.
    Returns:
        [...] float32 in [0, 1]; NaN where a row has no token.
    Raises:
        ValueError, TypeError: as `mean_nll`.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    return jnp.exp(-mean_nll(logps, where=where, lengths=lengths))


def probability_with_options(
    correct_nll: Array, wrong_nll: Array, *, eps: float = 0.0
) -> Array:
    """The right answer's share of what it and the wrong options get together.

    Computes p / (p + sum_k q_k + eps) with p = exp(-correct_nll), q = exp(-wrong_nll).

    Args:
        correct_nll: [...] float, `mean_nll` of the right answer, nats a token.
        wrong_nll: [..., K] float, that of the wrong options.
        eps: added below; OpenUnlearning's is 1e-10, and with it a collapsed model gets
            0 and not its share of almost nothing.
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
    """How likely wrong answers are beside the right one: w / (c + eps).

    c = exp(-correct_nll), and w is the mean of exp(-wrong_nll) over K wrong answers.
    Near 1 for a model that does not know, near 0 for one that does; not bounded above.
    For rows to forget and to retain the right answer is the paraphrase, so that what
    was learned word by word does not decide.

    Args:
        correct_nll: [...] float, `mean_nll` of the right answer, nats a token.
        wrong_nll: [..., K] float, that of the wrong answers.
        mean: how the K become one; "geometric" is exp(-mean_k wrong_nll).
        eps: added to c; with 0 the ratio is a single exp of a difference, exact also
            where both probabilities underflow.
    Returns:
        [...] float32, >= 0.
    Raises:
        ValueError: if mean is unknown, eps < 0, the leading axes differ or there is no
            wrong answer.
    Paper and code: OpenUnlearning takes the geometric mean and eps=1e-10. TOFU's own
        code logs the geometric mean, inverted, and aggregates the arithmetic one.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    correct, wrong = _pair("truth_ratio", correct_nll, wrong_nll, eps)
    joined = _joined("truth_ratio", wrong, mean)
    if eps:
        return jnp.exp(-joined) / (jnp.exp(-correct) + eps)
    return jnp.exp(correct - joined)


def truth_probability(
    correct_nll: Array, wrong_nll: Array, *, mean: str = "geometric", eps: float = 0.0
) -> Array:
    """c / (c + w + eps), the truth ratio as a share (OpenUnlearning's prob_mean).

    Args, Raises: as `truth_ratio`.
    Returns:
        [...] float32 in [0, 1]; 1/2 for a model that does not know.
    """
    correct, wrong = _pair("truth_probability", correct_nll, wrong_nll, eps)
    joined = _joined("truth_probability", wrong, mean)
    if eps:
        right = jnp.exp(-correct)
        return right / (right + jnp.exp(-joined) + eps)
    return jax.nn.sigmoid(joined - correct)


def truth_score(ratio: Array, *, better: str, eps: float = 0.0) -> Array:
    """A truth ratio as a score in [0, 1], of which 1 is best; then take the mean.

    "closer_to_1_better" is min(R, 1 / (R + eps)), for rows to forget: neither answer
    is preferred. "true_better" is max(0, 1 - R), for all others: the right one is.

    Args:
        ratio: [...] float, `truth_ratio`.
        better: one of the two.
        eps: OpenUnlearning's is 1e-10.
    Returns:
        [...] float32 in [0, 1].
    Raises:
        ValueError: if better is unknown or eps < 0.
    """
    _checks.one_of("truth_score", BETTER, better=better)
    _checks.not_negative("truth_score", eps=eps)
    ratio = _common.at_least_float32(ratio)
    if better == "true_better":
        return jnp.maximum(1.0 - ratio, 0.0)
    return jnp.minimum(ratio, 1.0 / (ratio + eps))


def _pair(owner, correct_nll, wrong_nll, eps):
    _checks.not_negative(owner, eps=eps)
    correct, wrong = map(_common.at_least_float32, (correct_nll, wrong_nll))
    if not wrong.ndim or not wrong.shape[-1]:
        raise ValueError(
            f"{owner} needs wrong_nll [..., K] with K >= 1 wrong answers, got shape "
            f"{wrong.shape}."
        )
    _checks.same_shape(
        owner, correct_nll=correct, **{"wrong_nll[..., 0]": wrong[..., 0]}
    )
    return correct, wrong


def _joined(owner, wrong, mean):
    """The K wrong answers' nll as one."""
    _checks.one_of(owner, MEANS, mean=mean)
    if mean == "geometric":
        return wrong.mean(-1)
    count = jnp.log(jnp.asarray(wrong.shape[-1], wrong.dtype))
    return count - jax.nn.logsumexp(-wrong, axis=-1)
