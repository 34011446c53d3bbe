# SPDX-License-Identifier: Apache-2.0
"""Comparison of two sets of scores: AUC, its interval, PrivLeak, forget quality.

These functions take all examples and run on the host in float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array, PRNGKey


class Interval(NamedTuple):
    """A statistic and its interval: low <= high, and value is nearly always between."""

    value: float
    low: float
    high: float


class ForgetQuality(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test.

    Attributes:
        pvalue: in [0, 1]; near 1 if the two samples are not distinguishable.
        statistic: largest distance between the two distribution functions, in [0, 1].
    """

    pvalue: float
    statistic: float


def auc(members: Array, others: Array) -> float:
    """AUC: probability that a non-member scores higher than a member; ties count 1/2.

    Args:
        members: [n] float, scores of rows that were trained on (the forget set).
        others: [m] float, scores of rows that were never trained on.
    Returns:
        In [0, 1]; 0.5 if the score does not separate the sets. It equals the area under
        the ROC curve with label 0 for members and 1 for others.
    Raises:
        ValueError: if an array is empty, does not have one axis, or has NaN.
    """
    members, others = _common.on_host("auc", members=members, others=others)
    members = np.sort(members)
    below = np.searchsorted(members, others, side="left")
    up_to = np.searchsorted(members, others, side="right")
    return float(np.mean(below + up_to) / (2 * members.size))


def bootstrap(
    statistic: Callable[..., float],
    *samples: Array,
    key: PRNGKey,
    level: float = 0.95,
    resamples: int = 1000,
) -> Interval:
    """Percentile bootstrap interval of a statistic, from resampled examples.

    `bootstrap(auc, members, others, key=key)` resamples both sets, independently.

    Args:
        statistic: takes the samples, returns a float.
        *samples: [n], [m], ... float, scores per example.
        key: draws the resamples; the same key gives the same interval.
        level: fraction of the resampled values inside the interval, in (0, 1).
        resamples: number of resamples.
    Returns:
        The statistic of the given samples, and the two percentiles.
    Raises:
        ValueError: if level is outside (0, 1), there is no sample, or a sample is
            empty, does not have one axis, or has NaN.
    """
    _checks.positive("bootstrap", level=level)
    _checks.positive_int("bootstrap", resamples=resamples)
    if level >= 1:
        raise ValueError(f"bootstrap needs level < 1, got level={level}.")
    if not samples:
        raise ValueError("bootstrap needs at least one sample, got none.")
    named = {f"samples[{i}]": sample for i, sample in enumerate(samples)}
    values = _common.on_host("bootstrap", **named)
    keys = jax.random.split(key, len(values))
    draws = [
        x[np.asarray(jax.random.randint(key, (resamples, x.size), 0, x.size))]
        for key, x in zip(keys, values, strict=True)
    ]
    drawn = [statistic(*each) for each in zip(*draws, strict=True)]
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(statistic(*values)), float(low), float(high))


def privleak(auc: float, retain_auc: float = 0.5, *, eps: float = 0.0) -> float:
    """PrivLeak: 100 (s - s_r) / (s_r + eps) with s = 1 - auc, s_r = 1 - retain_auc.

    Args:
        auc: `auc` of an attack (Min-K% in MUSE) on the unlearned model, in [0, 1].
        retain_auc: the same on a retrained model; 0.5 if there is none.
        eps: OpenUnlearning uses 1e-10.
    Returns:
        Percent. 0 is ideal; below 0 forgotten rows still look like members; above 0
        they score even less like members than new rows (over-unlearning).
    Raises:
        ValueError: if an AUC is outside [0, 1], or s_r + eps is 0.
    Paper and code: MUSE's code and its tables of retrained models report 1 - auc; for
        those numbers PrivLeak is `relative_difference`.
    References: Shi et al. 2024, https://arxiv.org/abs/2407.06460
    """
    _area("privleak", auc=auc, retain_auc=retain_auc)
    return _relative("privleak", 1 - auc, 1 - retain_auc, eps)


def relative_difference(value: float, reference: float, *, eps: float = 0.0) -> float:
    """Relative difference 100 (value - reference) / (reference + eps), percent.

    Args:
        value: a finite number.
        reference: a finite number; not 0 if eps=0.
        eps: OpenUnlearning uses 1e-10.
    Raises:
        ValueError: if a number is not finite, or reference + eps is 0.
    """
    _checks.finite("relative_difference", value=value, reference=reference)
    return _relative("relative_difference", value, reference, eps)


def forget_quality(ratios: Array, retain_ratios: Array) -> ForgetQuality:
    """TOFU's forget quality: are the truth ratios those of a retrained model?

    A two-sided two-sample Kolmogorov-Smirnov test, with scipy's choice between the
    exact and the asymptotic p-value. It depends only on the order of the ratios, so
    inverting all of them changes nothing.

    Args:
        ratios: [n] float, `truth_ratio` of the unlearned model on the forget set; inf
            is allowed.
        retain_ratios: [m] float, `truth_ratio` of the retrained model.
    Returns:
        The p-value and the statistic of the test.
    Raises:
        ValueError: if an array is empty, does not have one axis, or has NaN.
            ModuleNotFoundError: if scipy is missing.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    name = "forget_quality"
    pair = _common.on_host(name, ratios=ratios, retain_ratios=retain_ratios)
    stats = _checks.library(name, "scipy.stats", "metrics")
    test = stats.ks_2samp(*pair)
    return ForgetQuality(float(test.pvalue), float(test.statistic))


def _area(owner, **areas):
    for name, value in areas.items():
        if not 0 <= float(value) <= 1:
            raise ValueError(
                f"{owner} needs {name} in [0, 1], the area under a ROC curve, got "
                f"{name}={value}."
            )


def _relative(owner, value, reference, eps):
    _checks.not_negative(owner, eps=eps)
    denominator = float(reference) + float(eps)
    if denominator == 0:
        raise ValueError(
            f"{owner} needs a reference that is not 0, got reference={reference} and "
            f"eps={eps}. Pass eps > 0, or report the difference."
        )
    return float(100 * (float(value) - float(reference)) / denominator)
