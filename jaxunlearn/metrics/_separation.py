# SPDX-License-Identifier: Apache-2.0
"""How far two sets of scores lie apart: AUC, its interval, PrivLeak, forget quality.

These run on the host in float64, over all examples at once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array, PRNGKey


class Interval(NamedTuple):
    """A statistic and the ends of its interval; low <= high, value nearly always
    between."""

    value: float
    low: float
    high: float


class ForgetQuality(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test.

    Attributes:
        pvalue: in [0, 1]; near 1 where the two cannot be told apart.
        statistic: largest distance of the two distribution functions, in [0, 1].
    """

    pvalue: float
    statistic: float


def auc(members: Array, others: Array) -> float:
    """Probability that a non-member scores above a member; a tie counts one half.

    Args:
        members: [n] float, scores of rows that were trained on (the forgotten ones).
        others: [m] float, scores of rows that never were.
    Returns:
        In [0, 1]: 0.5 where the score tells nothing. The same as the area under the
        ROC curve with members labelled 0 and others 1.
    Raises:
        ValueError: if one is empty, has another rank or a NaN.
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
    """Percentile bootstrap: a statistic's interval under redrawing of the examples.

    `bootstrap(auc, members, others, key=key)` redraws both sets, each by itself.

    Args:
        statistic: called with the samples, returns a float.
        *samples: [n], [m], ... float, scores by example.
        key: key; the same key gives the same interval.
        level: share of the resampled values between the ends, in (0, 1).
        resamples: how often to draw.
    Returns:
        The statistic of the samples as they came, and the two percentiles.
    Raises:
        ValueError: if level is outside (0, 1), there is no sample, or one is empty, has
            another rank or a NaN.
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
        retain_auc: that of a model never trained on the forgotten rows; 0.5 if there is
            none.
        eps: OpenUnlearning's is 1e-10.
    Returns:
        Percent: 0 is ideal, below it forgotten rows still look like members, above it
        they look stranger than new ones.
    Raises:
        ValueError: if an area is outside [0, 1], or s_r + eps is 0.
    Paper and code: MUSE's code and its tables of retrained models turn the area round
        (1 - auc), which makes it `relative_difference` of those numbers.
    References: Shi et al. 2024, https://arxiv.org/abs/2407.06460
    """
    _area("privleak", auc=auc, retain_auc=retain_auc)
    return _relative("privleak", 1 - auc, 1 - retain_auc, eps)


def relative_difference(value: float, reference: float, *, eps: float = 0.0) -> float:
    """100 (value - reference) / (reference + eps), percent.

    Args:
        value: a finite number.
        reference: what it is compared with; with eps=0 not 0.
        eps: OpenUnlearning's is 1e-10.
    Raises:
        ValueError: if a number is not finite, or reference + eps is 0.
    """
    _checks.finite("relative_difference", value=value, reference=reference)
    return _relative("relative_difference", value, reference, eps)


def forget_quality(ratios: Array, retain_ratios: Array) -> ForgetQuality:
    """Whether truth ratios are as of a model that never saw the forgotten rows.

    A two-sided two-sample Kolmogorov-Smirnov test, with scipy's choice between the
    exact and the asymptotic p-value. It only looks at the order, so inverting all
    ratios changes nothing.

    Args:
        ratios: [n] float, `truth_ratio` of the model on the forgotten rows; inf is
            allowed.
        retain_ratios: [m] float, the same under the retrained model.
    Raises:
        ValueError: if one is empty, has another rank or a NaN. ModuleNotFoundError: if
            scipy is missing.
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
    below = float(reference) + float(eps)
    if below == 0:
        raise ValueError(
            f"{owner} divides by the reference's value, which is 0. Give eps > 0, or "
            "report the difference."
        )
    return float(100 * (float(value) - float(reference)) / below)
