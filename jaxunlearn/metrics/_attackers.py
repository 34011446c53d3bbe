# SPDX-License-Identifier: Apache-2.0
"""Fitted membership attacks: from scores of rows to one number, in float64.

A row has one score (such as its loss or entropy) or several. A fitted attacker predicts
from them whether the row was trained on.
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
        """[n] bool, whether a row is predicted to be a member."""
        return _columns("Logistic", features) @ self.weights + self.intercept > 0


class Threshold(NamedTuple):
    """The result of a threshold attack on rows that were not used for calibration.

    Attributes:
        balanced_accuracy: mean of the true positive and the true negative rate.
        auc: as `auc`; members have the lower scores.
        tpr: true positive rate at a false positive rate of at most 1 percent.
    """

    balanced_accuracy: float
    auc: float
    tpr: float


def logistic_regression(
    features: Array, members: Array, *, c: float = 1.0, balanced: bool = False
) -> Logistic:
    """Logistic regression of membership, with the minimum that scikit-learn finds.

    Minimises |w|^2 / 2 + c sum_i v_i log(1 + exp(-s_i (w x_i + b))), where s_i = 1 for
    members and -1 for others, by Newton's method with step halving. The intercept is
    not penalised. Features are not standardised, so their scale matters.

    Args:
        features: [n] or [n, k] float.
        members: [n] bool, with at least one True and one False.
        c: inverse strength of the penalty, > 0.
        balanced: v_i is n / (2 times the size of the class of i) instead of 1.
    Returns:
        The fitted weights and intercept.
    Raises:
        ValueError: if features are not finite, the lengths differ, or a class is empty.
    """
    owner = "logistic_regression"
    _checks.positive(owner, c=c)
    x = _columns(owner, features)
    members = np.asarray(members, bool)
    if members.shape != (len(x),) or members.all() or not members.any():
        raise ValueError(
            f"{owner} needs members for each of {len(x)} rows, with at least one True "
            f"and one False, got shape {members.shape} with {int(members.sum())} "
            "members."
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
        # sigmoid(-margin), computed with tanh, which cannot overflow.
        wrong = 0.5 * (1 - np.tanh(0.5 * sign * (wide @ w)))
        gradient = penalty * w - wide.T @ (each * sign * wrong)
        curve = each * wrong * (1 - wrong)
        hessian = (wide * curve[:, None]).T @ wide + np.diag(penalty + 1e-300)
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        # Near the minimum values differ only by rounding, which must not halve a step.
        max_value, size = value(w) * (1 + 1e-13), 1.0
        while value(w - size * step) > max_value and size > 1e-8:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() <= 1e-10 * (1 + np.abs(w).max()):
            break
    return Logistic(w[:-1], float(w[-1]))


def stratified_splits(
    members: Array, *, key: PRNGKey, num_splits: int = 10, test_fraction: float = 0.1
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random splits into train and test rows with the same share of members in both.

    Args:
        members: [n] bool.
        key: draws the splits.
        num_splits: number of splits.
        test_fraction: fraction of the members, and of the others, in the test rows;
            rounded, at least one row.
    Returns:
        num_splits pairs (indices of train rows, indices of test rows).
    """
    _checks.positive_int("stratified_splits", num_splits=num_splits)
    members = np.asarray(members, bool)
    found = []
    for split_key in jax.random.split(key, num_splits):
        rows = np.asarray(jax.random.permutation(split_key, len(members)))
        classes = [rows[members[rows]], rows[~members[rows]]]
        sizes = [max(1, round(test_fraction * len(each))) for each in classes]
        pairs = list(zip(classes, sizes, strict=True))
        train = np.concatenate([each[size:] for each, size in pairs])
        found.append((train, np.concatenate([each[:size] for each, size in pairs])))
    return found


def attack_accuracy(
    members: Array,
    others: Array,
    *,
    key: PRNGKey,
    splits: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> float:
    """Test accuracy of a logistic regression that separates forgotten from unseen rows.

    The larger set is reduced to the size of the smaller one at random. The regression
    is fitted on 9 of 10 rows and tested on the others; the result is the mean over 10
    such splits.

    Args:
        members: [n] float, such as the losses of the forget set.
        others: [m] float, scores of rows that were never trained on. For a forgotten
            class, use rows of that class; otherwise the attack only separates classes.
        key: draws the rows and the splits.
        splits: pairs (train rows, test rows) to use instead of random ones; they index
            members followed by others. Both sets must then have the same size.
    Returns:
        In [0, 1]. Near 0.5, or near the value of a retrained model, the attacker learns
        nothing.
    Raises:
        ValueError: if scores are not finite, or sizes differ with given splits.
    References: the starting kit of the NeurIPS 2023 unlearning challenge, as used by
        Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "attack_accuracy"
    members, others = (_columns(owner, x) for x in (members, others))
    row_key, split_key = jax.random.split(key)
    size = min(len(members), len(others))
    if splits is None:
        a, b = jax.random.split(row_key)
        members = members[np.asarray(jax.random.permutation(a, len(members)))[:size]]
        others = others[np.asarray(jax.random.permutation(b, len(others)))[:size]]
    elif len(members) != len(others):
        raise ValueError(
            f"{owner} needs as many members as others if splits are given, got "
            f"{len(members)} and {len(others)}. Reduce the larger set at random."
        )
    x = np.concatenate([members, others])
    labels = np.arange(2 * size) < size
    if splits is None:
        splits = stratified_splits(labels, key=split_key)
    hits = [
        np.mean(
            logistic_regression(x[train], labels[train]).predict(x[test])
            == labels[test]
        )
        for train, test in splits
    ]
    return float(np.mean(hits))


def attack_members(*, retain: Array, others: Array, forget: Array) -> float:
    """Fraction of the forget set that a fitted attacker predicts to be members.

    The attacker is a balanced logistic regression, fitted on retained rows against rows
    that were never trained on.

    Args:
        retain: [n] float, such as the entropy of predictions on retained rows.
        others: [m] float, the same on rows that were never trained on.
        forget: [k] float, the same on forgotten rows.
    Returns:
        In [0, 1]; compare it with the value of a retrained model.
    References: Chundawat et al. 2023, https://arxiv.org/abs/2205.08096
    """
    retain, others = (_columns("attack_members", x) for x in (retain, others))
    x = np.concatenate([retain, others])
    labels = np.arange(len(x)) < len(retain)
    fitted = logistic_regression(x, labels, balanced=True)
    return float(np.mean(fitted.predict(forget)))


def attack_threshold(
    *, retain: Array, calibration: Array, forget: Array, others: Array
) -> Threshold:
    """Membership attack by one threshold, calibrated on retained and unseen rows.

    A row is predicted to be a member if its score is at most t, where t is the score
    that separates `retain` and `calibration` with the highest balanced accuracy.

    Args:
        retain: [n] float, scores of retained rows; low for members, such as losses.
        calibration: [m] float, scores of one half of the rows never trained on.
        forget: [k] float, scores of forgotten rows, tested as members.
        others: [l] float, scores of the other half of the rows never trained on, tested
            as non-members.
    Returns:
        Balanced accuracy, AUC and true positive rate on `forget` and `others`.
    Raises:
        ValueError: if a set is empty or has NaN.
    """
    owner = "attack_threshold"
    retain, calibration, forget, others = _common.on_host(
        owner, retain=retain, calibration=calibration, forget=forget, others=others
    )
    thresholds = np.unique(np.concatenate([retain, calibration]))

    def below(values):
        return np.searchsorted(np.sort(values), thresholds, side="right") / len(values)

    best = thresholds[np.argmax(below(retain) - below(calibration))]
    rates = np.mean(forget <= best), np.mean(others > best)
    at_one_percent = np.sort(others)[int(0.01 * len(others))]
    return Threshold(
        float(np.mean(rates)),
        _separation.auc(forget, others),
        float(np.mean(forget < at_one_percent)),
    )


def _columns(owner: str, features: Array) -> np.ndarray:
    """[n, k] float64, finite."""
    x = np.asarray(features, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ValueError(
            f"{owner} needs finite features [n] or [n, k], n >= 1, got shape "
            f"{np.shape(features)} with {int((~np.isfinite(x)).sum())} not finite. "
            "Scores that are not finite usually mean that the model diverged."
        )
    return x
