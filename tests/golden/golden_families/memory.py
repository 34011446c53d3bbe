# SPDX-License-Identifier: Apache-2.0
"""Metrics of answers: probability, memorisation, truth ratio."""

import jax.numpy as jnp

from golden_families import reading
from jaxunlearn import metrics

EPS = 1e-10  # OpenUnlearning adds it to every denominator


def probability(case, x):
    """Per row, divided by the number of all labels, predicted or not."""
    prob, nll = _answers(x, "forget")
    return {"prob": prob, "avg_loss": nll, "agg_value": prob.mean()}


def several(case, x):
    """Per answer [rows, answers]; the mean over answers first, then over rows."""
    parts = sorted(
        (name.removesuffix("_logits") for name in x if name.endswith("_logits")),
        key=lambda part: int(part.removeprefix("ans")),
    )
    answers = [_answers(x, part) for part in parts]
    prob, nll = (jnp.stack(each, axis=1) for each in zip(*answers, strict=True))
    return {"prob": prob, "avg_loss": nll, "agg_value": prob.mean(1).mean()}


def tokenwise(case, x):
    """Rows of log-probabilities from the left, the rest NaN; labels in the same way.

    As wide as the longest row, so it looks at the values and runs without jit.
    """
    logps, where = reading.answer_tokens(x, "forget")
    where = metrics.drop_last(where)
    lengths = where.sum(-1)
    order = jnp.argsort(~where, axis=-1, stable=True)[:, : int(lengths.max())]
    real = jnp.arange(order.shape[1]) < lengths[:, None]
    labels = x["forget_labels"][:, 1:].astype(logps.dtype)
    logps, labels = (
        jnp.where(real, jnp.take_along_axis(each, order, axis=1), jnp.nan)
        for each in (logps, labels)
    )
    return {"logprobs": logps, "labels": labels, "lengths": lengths}


def exact(case, x):
    """Fraction of tokens without the last one; rows without tokens are skipped."""
    hits, where = _hits(x)
    score = metrics.exact_memorization(hits, where=where)
    score = score.astype(x["forget_logits"].dtype)
    return {"score": score, "agg_value": jnp.nanmean(score)}


def extraction(case, x):
    """With OpenUnlearning's minimum of 1 / n."""
    hits, where = _hits(x)
    score = metrics.extraction_strength(hits, where=where, compat="openunlearning")
    score = score.astype(x["forget_logits"].dtype)
    return {"score": score, "agg_value": score.mean()}


def with_options(case, x):
    """The normalised probability of the correct answer."""
    prob = metrics.probability_with_options(*_losses(x), eps=EPS)
    return {"prob": prob, "agg_value": prob.mean()}


def truth_ratio(case, x):
    """Ratios or probabilities per row, by `aggregator`, and their aggregate."""
    kind = case["hyperparameters"]["aggregator"]
    if kind == "prob_mean":
        score = metrics.truth_probability(*_losses(x), eps=EPS)
        return {"score": score, "agg_value": score.mean()}
    score = metrics.truth_ratio(*_losses(x), eps=EPS)
    better = metrics.truth_score(score, better=kind, eps=EPS)
    return {"score": score, "agg_value": better.mean()}


def classifier(case, x):
    """Probability of the class per row, and its mean."""
    class_id = case["hyperparameters"]["class_id"]
    score = metrics.class_probability(x["classifier_logits"], class_id)
    return {"score": score, "agg_value": score.mean()}


def _answers(x, part):
    logps, where = reading.answer_tokens(x, part)
    lengths = (x[f"{part}_labels"] != reading.IGNORE).sum(-1)
    nll = metrics.mean_nll(logps, where=where, lengths=lengths)
    return jnp.exp(-nll), nll


def _hits(x):
    targets = x["forget_labels"][:, 1:]
    hits = metrics.greedy_hits(x["forget_logits"][:, :-1], targets)
    return hits, metrics.drop_last(targets != reading.IGNORE)


def _losses(x):
    return x["correct_avg_loss"], x["wrong_avg_loss"]
