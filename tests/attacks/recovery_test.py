# SPDX-License-Identifier: Apache-2.0
"""Recovery rates by hand."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import attacks


def sweep(*accuracies, n=20):
    """A sweep with the given accuracies [R][epochs + 1]."""
    hits = np.array([[np.arange(n) < round(a * n) for a in row] for row in accuracies])
    rates = tuple(range(1, len(hits) + 1))
    ones = np.ones((len(hits), hits.shape[1] - 1), np.float32)
    return attacks.Sweep(rates, hits, np.zeros((*hits.shape, 4)), ones, ones.all(1))


def test_recovery_by_hand():
    unlearned = [sweep((0.3, 0.4, 0.5), (0.3, 0.7, 0.2)), sweep((0.2, 0.5, 0.4))]
    original = [sweep((0.9, 1.0, 0.8)), sweep((0.8, 0.8, 0.6))]
    found = attacks.recovery(unlearned=unlearned, original=original)
    assert_allclose(found["unlearned"], (0.7 + 0.5) / 2)
    assert_allclose(found["original"], (1.0 + 0.8) / 2)
    assert_allclose(found["before"], 0.25)
    assert_allclose(found["rate"], 0.6 / 0.9)
    assert_allclose(found["above_chance"], 0.35 / 0.65)
    assert_allclose(found["floor"], 0.25 / 0.9)
    assert_allclose(found["error"], 2 * math.sqrt(0.25 / 40))
    nothing = attacks.recovery(unlearned=[sweep((0.25,))], original=[sweep((1.0,))])
    assert nothing["above_chance"] == 0 and nothing["rate"] == nothing["floor"] == 0.25


def test_nested_choice_has_no_selection_bias():
    """The best of many random guesses on V is above chance; a nested choice is not."""
    rng = np.random.default_rng(0)
    guesses = rng.random((6, 7, 100)) < 0.25
    sweeps_of_chance = attacks.Sweep(
        (1.0,) * 6, guesses, guesses, np.ones((6, 6)), np.ones(6, bool)
    )
    assert attacks.best_accuracy([sweeps_of_chance]) > 0.3
    many = []
    for seed in range(20):
        guesses = np.random.default_rng(seed).random((6, 7, 100)) < 0.25
        many.append(sweeps_of_chance._replace(hits=guesses))
    assert abs(attacks.best_accuracy(many, nested=True) - 0.25) < 0.03
    sure = sweep((0.0, 1.0))
    assert attacks.best_accuracy([sure], nested=True) == 1.0


def test_the_strongest_unlearning_within_the_bound():
    runs = [
        dict(name="a", forget=0.9, retain=0.80),
        dict(name="b", forget=0.4, retain=0.75),
        dict(name="c", forget=0.3, retain=0.71),
        dict(name="d", forget=0.2, retain=0.40),
    ]
    pick = {
        d: attacks.strongest_unlearning(runs, 0.8, max_drop=d)
        for d in (0.0, 0.05, 0.1, 0.3, 0.5)
    }
    assert [run["name"] for run in pick.values()] == ["a", "b", "c", "c", "d"]
    assert (
        attacks.strongest_unlearning(runs, 0.8, max_drop=0.05, relative=True)["name"]
        == "a"
    )
    assert (
        attacks.strongest_unlearning(runs, 0.8, max_drop=0.0625, relative=True)["name"]
        == "b"
    )
    assert attacks.strongest_unlearning(runs, 0.9, max_drop=0.05) is None


def test_errors():
    with pytest.raises(ValueError, match="at least one rotation"):
        attacks.best_accuracy([])
    with pytest.raises(ValueError, match=r"facts \[20\] and \[10\]"):
        attacks.recovery(unlearned=[sweep((1.0,))], original=[sweep((1.0,), n=10)])
    with pytest.raises(ValueError, match="chance=1"):
        attacks.recovery(unlearned=[sweep((1.0,))], original=[sweep((1.0,))], chance=1)
    with pytest.raises(ValueError, match="nested=False"):
        attacks.best_accuracy([sweep((1.0,), n=1)], nested=True)
    with pytest.raises(KeyError, match="'retain'"):
        attacks.strongest_unlearning([dict(forget=1.0)], 1.0)
    at_chance = attacks.recovery(unlearned=[sweep((0.2,))], original=[sweep((0.25,))])
    assert math.isnan(at_chance["above_chance"])
