# SPDX-License-Identifier: Apache-2.0
"""Fitted attacks equal scikit-learn's up to rounding, and guess without a signal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import metrics

KEY = jax.random.key(0)


def scores(seed, members=400, others=400, shift=0.7, columns=None):
    rng = np.random.default_rng(seed)
    size = (columns,) if columns else ()
    a = rng.exponential(1.0, (members, *size))
    return a, rng.exponential(1.0 + shift, (others, *size))


def sklearn_fit(x, y, c=1.0, balanced=False):
    linear = pytest.importorskip("sklearn.linear_model")
    weight = "balanced" if balanced else None
    model = linear.LogisticRegression(
        C=c, class_weight=weight, solver="newton-cholesky", tol=1e-14, max_iter=1000
    )
    return model.fit(x if x.ndim == 2 else x[:, None], y)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
def test_the_regression_equals_scikit_learns(columns, balanced, c):
    a, b = scores(1, 300, 90, columns=columns)
    x, y = np.concatenate([a, b]), np.arange(390) < 300
    ours = metrics.logistic_regression(x, y, c=c, balanced=balanced)
    theirs = sklearn_fit(x, y, c, balanced)
    assert_allclose(ours.weights, theirs.coef_[0], rtol=0, atol=1e-9)
    assert_allclose(ours.intercept, theirs.intercept_[0], rtol=0, atol=1e-9)
    wide = x if x.ndim == 2 else x[:, None]
    assert (ours.predict(x) == theirs.predict(wide)).all()


def test_the_attacks_equal_scikit_learns_on_the_same_scores_and_splits():
    selection = pytest.importorskip("sklearn.model_selection")
    a, b = scores(2, 500, 500)
    x, y = np.concatenate([a, b]), np.arange(1000) < 500
    cuts = selection.StratifiedShuffleSplit(n_splits=10, test_size=0.1, random_state=0)
    splits = list(cuts.split(x, y))
    wanted = np.mean(
        [sklearn_fit(x[i], y[i]).score(x[j][:, None], y[j]) for i, j in splits]
    )
    got = metrics.attack_accuracy(a, b, key=KEY, splits=splits)
    assert_allclose(got, wanted, rtol=0, atol=1e-9)
    forget = scores(3, 200)[0]
    wanted = sklearn_fit(x, y, balanced=True).predict(forget[:, None]).mean()
    assert_allclose(
        metrics.attack_members(retain=a, others=b, forget=forget),
        wanted,
        rtol=0,
        atol=1e-9,
    )


def test_the_threshold_is_the_roc_curves_best_point():
    curves = pytest.importorskip("sklearn.metrics")
    retain, calibration = scores(4, 300, 200)
    forget, others = scores(5, 250, 350)
    got = metrics.attack_threshold(
        retain=retain, calibration=calibration, forget=forget, others=others
    )
    y = np.arange(500) < 300
    fpr, tpr, cuts = curves.roc_curve(
        y, -np.concatenate([retain, calibration]), drop_intermediate=False
    )
    cut = -cuts[np.argmax(tpr - fpr)]
    wanted = curves.balanced_accuracy_score(
        np.arange(600) < 250, np.concatenate([forget, others]) <= cut
    )
    assert_allclose(got.balanced_accuracy, wanted, rtol=0, atol=1e-9)
    y, x = np.arange(600) < 250, np.concatenate([forget, others])
    assert_allclose(got.auc, curves.roc_auc_score(y, -x), rtol=0, atol=1e-9)
    fpr, tpr, _ = curves.roc_curve(y, -x, drop_intermediate=False)
    assert_allclose(got.tpr, tpr[fpr <= 0.01].max(), rtol=0, atol=1e-9)


def test_no_attack_separates_exchangeable_rows():
    kinds = {"accuracy": [], "members": [], "balanced": [], "auc": []}
    for seed in range(12):
        a, b = scores(10 + seed, 1500, 1500, shift=0.0)
        key = jax.random.fold_in(KEY, seed)
        kinds["accuracy"].append(metrics.attack_accuracy(a, b, key=key))
        kinds["members"].append(
            metrics.attack_members(retain=a[:700], others=b, forget=a[700:])
        )
        attack = metrics.attack_threshold(
            retain=a[:700], calibration=b[:700], forget=a[700:], others=b[700:]
        )
        kinds["balanced"].append(attack.balanced_accuracy)
        kinds["auc"].append(attack.auc)
    for kind, values in kinds.items():
        assert abs(np.mean(values) - 0.5) < 0.02, (kind, values)


def test_well_separated_members_are_found():
    a, b = np.zeros(60) + np.arange(60) / 600, 5 + np.arange(80) / 800
    assert metrics.attack_accuracy(a, b, key=KEY) == 1.0
    assert metrics.attack_members(retain=a, others=b, forget=a[:10]) == 1.0
    assert metrics.attack_members(retain=a, others=b, forget=b[:10]) == 0.0
    attack = metrics.attack_threshold(
        retain=a, calibration=b[:40], forget=a, others=b[40:]
    )
    assert attack == metrics.Threshold(1.0, 1.0, 1.0)


def test_splits_are_stratified_and_disjoint():
    members = np.arange(100) < 30
    for train, test in metrics.stratified_splits(members, key=KEY, num_splits=3):
        assert members[test].sum() == 3 and len(test) == 10
        assert sorted([*train, *test]) == list(range(100))


def test_invalid_scores_are_refused():
    with pytest.raises(ValueError, match="members .* got shape .* with 3 members"):
        metrics.logistic_regression(np.arange(3.0), np.ones(3, bool))
    with pytest.raises(ValueError, match="with 1 not finite"):
        metrics.attack_members(retain=[0.0, np.nan], others=[1.0], forget=[2.0])
    with pytest.raises(ValueError, match="as many members as others"):
        metrics.attack_accuracy([0.0], [1.0, 2.0], key=KEY, splits=[])
    with pytest.raises(ValueError, match="NaN"):
        metrics.attack_threshold(
            retain=[0.0], calibration=[1.0], forget=[np.nan], others=[1.0]
        )


def test_unlearning_and_overfitting_metrics_by_hand():
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[2.0]])}
    assert_allclose(metrics.unlearning_metric(forget=tree, retain=tree), 0.0, atol=1e-5)
    other = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([[0.0]])}
    assert_allclose(metrics.unlearning_metric(forget=tree, retain=other), 100.0)
    against = jax.tree.map(jnp.negative, tree)
    assert_allclose(metrics.unlearning_metric(forget=tree, retain=against), 200.0)
    assert np.isnan(
        metrics.unlearning_metric(
            forget=tree, retain=jax.tree.map(jnp.zeros_like, tree)
        )
    )
    assert_allclose(metrics.overfitting_metric(jnp.float32(5.0), tree), 2.0)
    assert_allclose(metrics.overfitting_metric(jnp.float32(1.0), tree), 2.0)
