# SPDX-License-Identifier: Apache-2.0
"""Membership attackers that are fitted: scores of rows to one number, in float64.

Scores are features of one number a row (a loss, an entropy) or several, and say nothing
by themselves; a fitted attacker turns them into guesses who was trained on.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.metrics import _common, _separation
from jaxunlearn.typing import Array, PRNGKey


class Logistic(NamedTuple):
    """A fitted logistic regression: log-odds = features @ weights + intercept."""

    weights: np.ndarray
    intercept: float

    def predict(self, features: Array) -> np.ndarray:
        """[n] bool, whether a row is likelier a member."""
        return _columns("Logistic", features) @ self.weights + self.intercept > 0


class Threshold(NamedTuple):
    """What an attack by one threshold achieves on rows it was not calibrated on.

    Attributes:
        balanced_accuracy: mean of the true positive and true negative rates.
        auc: as `auc`, where scores of members are the lower ones.
        tpr: true positive rate at a false positive rate of at most 1 percent.
    """

    balanced_accuracy: float
    auc: float
    tpr: float


def logistic_regression(
    features: Array, members: Array, *, c: float = 1.0, balanced: bool = False
) -> Logistic:
    """Fits log-odds of membership: the same minimum as scikit-learn's, to rounding.

    Minimises |w|^2 / 2 + c sum_i v_i log(1 + exp(-s_i (w x_i + b))), s_i = 1 for
    members and -1 for others, by Newton's method with halved steps. The intercept is
    not penalised and features are taken as they come, so their scale matters.

    Args:
        features: [n] or [n, k] float.
        members: [n] bool, both kinds at least once.
        c: inverse strength of the penalty, > 0.
        balanced: v_i = n / (2 n of its kind) instead of 1.
    Raises:
        ValueError: for features not finite, other lengths, or one kind alone.
    """
    owner = "logistic_regression"
    _checks.positive(owner, c=c)
    x = _columns(owner, features)
    members = np.asarray(members, bool)
    if members.shape != (len(x),) or members.all() or not members.any():
        raise ValueError(
            f"{owner} needs a member or not for each of {len(x)} rows and both kinds, "
            f"got shape {members.shape} with {int(members.sum())} members."
        )
    sign = np.where(members, 1.0, -1.0)
    each = np.full(len(x), float(c))
    if balanced:
        counts = np.where(members, members.sum(), (~members).sum())
        each *= len(x) / (2.0 * counts)
    wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = np.append(np.ones(x.shape[1]), 0.0)

    def value(w):
        margins = sign * (wide @ w)
        return each @ np.logaddexp(0, -margins) + 0.5 * penalty @ (w * w)

    w = np.zeros(wide.shape[1])
    for _ in range(100):
        # sigma(-margin), from tanh so that nothing overflows.
        wrong = 0.5 * (1 - np.tanh(0.5 * sign * (wide @ w)))
        gradient = penalty * w - wide.T @ (each * sign * wrong)
        curve = each * wrong * (1 - wrong)
        hessian = (wide * curve[:, None]).T @ wide + np.diag(penalty + 1e-300)
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        # Near the minimum values differ by rounding alone, which must halve no step.
        most, size = value(w) * (1 + 1e-13), 1.0
        while value(w - size * step) > most and size > 1e-8:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() <= 1e-10 * (1 + np.abs(w).max()):
            break
    return Logistic(w[:-1], float(w[-1]))


def stratified_splits(
    members: Array, *, key: PRNGKey, count: int = 10, test: float = 0.1
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random (train rows, test rows) with the same share of members in both.

    Args:
        members: [n] bool.
        key: of the draws.
        count: how many.
        test: share of each kind that is tested, rounded, at least one row.
    """
    _checks.positive_int("stratified_splits", count=count)
    members = np.asarray(members, bool)
    found = []
    for split_key in jax.random.split(key, count):
        rows = np.asarray(jax.random.permutation(split_key, len(members)))
        kinds = [rows[members[rows]], rows[~members[rows]]]
        cuts = [max(1, round(test * len(kind))) for kind in kinds]
        pairs = list(zip(kinds, cuts, strict=True))
        train = np.concatenate([kind[cut:] for kind, cut in pairs])
        found.append((train, np.concatenate([kind[:cut] for kind, cut in pairs])))
    return found


def attack_accuracy(
    members: Array,
    others: Array,
    *,
    key: PRNGKey,
    splits: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> float:
    """How well a logistic regression tells forgotten rows from rows never seen.

    Both sets are cut to one size, at random and not from their beginnings, fitted on 9
    of 10 rows and tested on the others; the mean over 10 such splits.

    Args:
        members: [n] float, such as losses of the forget set.
        others: [m] float, of rows that were never trained on; for a forgotten class
            take rows of that class, or the attack only tells classes apart.
        key: of sizes and splits.
        splits: (train rows, test rows) of members, then others, given instead; then
            both sets must be of one size.
    Returns:
        In [0, 1]; near 0.5 where nothing is told, or what a retrained model gives.
    References: the starting kit of the NeurIPS 2023 unlearning challenge, as Khan 2024
        uses it, https://arxiv.org/abs/2402.00195
    """
    owner = "attack_accuracy"
    members, others = (_columns(owner, x) for x in (members, others))
    cut, draw = jax.random.split(key)
    size = min(len(members), len(others))
    if splits is None:
        a, b = jax.random.split(cut)
        members = members[np.asarray(jax.random.permutation(a, len(members)))[:size]]
        others = others[np.asarray(jax.random.permutation(b, len(others)))[:size]]
    elif len(members) != len(others):
        raise ValueError(
            f"{owner} needs as many members as others for splits of your own, got "
            f"{len(members)} and {len(others)}. Cut the longer at random."
        )
    x = np.concatenate([members, others])
    real = np.arange(2 * size) < size
    if splits is None:
        splits = stratified_splits(real, key=draw)
    hits = [
        np.mean(
            logistic_regression(x[train], real[train]).predict(x[test]) == real[test]
        )
        for train, test in splits
    ]
    return float(np.mean(hits))


def attack_members(retain: Array, others: Array, forget: Array) -> float:
    """Share of the forget set that an attacker takes for members.

    It is fitted (balanced) on rows that stay against rows never seen.

    Args:
        retain, others, forget: [n], [m], [k] float, such as the entropy of predictions.
    Returns:
        In [0, 1]; to compare with a retrained model's.
    References: Chundawat et al. 2023, https://arxiv.org/abs/2205.08096
    """
    retain, others = (_columns("attack_members", x) for x in (retain, others))
    x = np.concatenate([retain, others])
    real = np.arange(len(x)) < len(retain)
    fitted = logistic_regression(x, real, balanced=True)
    return float(np.mean(fitted.predict(forget)))


def attack_threshold(
    retain: Array, calibration: Array, forget: Array, others: Array
) -> Threshold:
    """An attack by one threshold, calibrated on rows that stay against rows never seen.

    A row counts as a member if its score is at most t, where t is the score that
    separates `retain` and `calibration` with the highest balanced accuracy.

    Args:
        retain, calibration: [n], [m] float, low for members, such as losses.
        forget, others: [k], [l] float, what is judged; `others` and `calibration` are
            halves of the rows never seen.
    Raises:
        ValueError: for an empty set or NaN.
    """
    owner = "attack_threshold"
    retain, calibration, forget, others = _common.on_host(
        owner, retain=retain, calibration=calibration, forget=forget, others=others
    )
    cuts = np.unique(np.concatenate([retain, calibration]))

    def below(values):
        return np.searchsorted(np.sort(values), cuts, side="right") / len(values)

    best = cuts[np.argmax(below(retain) - below(calibration))]
    rates = np.mean(forget <= best), np.mean(others > best)
    few = np.sort(others)[int(0.01 * len(others))]
    return Threshold(
        float(np.mean(rates)),
        _separation.auc(forget, others),
        float(np.mean(forget < few)),
    )


def _columns(owner: str, features: Array) -> np.ndarray:
    """[n, k] float64, finite."""
    x = np.asarray(features, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(
            f"{owner} needs finite features [n] or [n, k], n >= 1, got shape "
            f"{np.shape(features)} with {int((~np.isfinite(x)).sum())} not finite. A "
            "broken model is no unlearned one."
        )
    return x
