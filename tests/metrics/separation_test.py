# SPDX-License-Identifier: Apache-2.0
"""AUC, its interval, PrivLeak, means, and SemEval's score."""

import itertools

import jax
import numpy as np
import pytest

from jaxunlearn import metrics

TWELVE = list(
    itertools.product(("forget", "retain"), ("Task1", "Task2", "Task3"), ("sc", "qa"))
)
HALVES = dict.fromkeys(TWELVE, 0.5)


@pytest.mark.parametrize(
    ("members", "others", "wanted"),
    [
        ([1, 2], [3, 4], 1.0),
        ([3, 4], [1, 2], 0.0),
        ([1, 1, 1], [1], 0.5),
        # Of six pairs, 2 > 1, 3 > 1 and 3 > 2 are ordered, and 2 = 2 is a tie.
        ([1, 2, 9], [2, 3], 3.5 / 6),
        ([-np.inf], [np.inf], 1.0),
    ],
)
def test_auc(members, others, wanted):
    assert metrics.auc(members, others) == pytest.approx(wanted)


def test_auc_is_the_fraction_of_ordered_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 37), rng.integers(1, 6, 23)
    pairs = (b[:, None] > a) + 0.5 * (b[:, None] == a)
    assert metrics.auc(a, b) == pytest.approx(pairs.mean(), rel=1e-12)
    assert metrics.auc(b, a) == pytest.approx(1 - pairs.mean(), rel=1e-12)


def test_bootstrap_intervals_have_their_nominal_coverage():
    """Two normal samples with means one apart have AUC Phi(1 / sqrt 2) = 0.7602."""
    rng, hits, widths = np.random.default_rng(0), 0, []
    for i in range(60):
        a, b = rng.normal(0, 1, 40), rng.normal(1, 1, 40)
        key = jax.random.key(i)
        found = metrics.bootstrap(metrics.auc, a, b, key=key, level=0.8, resamples=200)
        assert found.low <= found.value <= found.high
        assert found.value == metrics.auc(a, b)
        hits += found.low <= 0.7602 <= found.high
        widths.append(found.high - found.low)
    assert 38 <= hits <= 57  # 48 of 60 expected, with a standard deviation of 3.1
    assert 0.08 < np.mean(widths) < 0.2


def test_bootstrap_is_repeatable_and_wider_at_a_higher_level():
    a, b, key = np.arange(20.0), np.arange(20.0) + 3, jax.random.key(3)

    def run(level, key=key):
        return metrics.bootstrap(metrics.auc, a, b, key=key, level=level)

    assert run(0.9) == run(0.9)
    assert run(0.9) != run(0.9, jax.random.key(4))
    narrow, wide = run(0.5), run(0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_of_a_constant_has_no_width():
    found = metrics.bootstrap(metrics.mean, np.full(5, 2.0), key=jax.random.key(0))
    assert found == (2.0, 2.0, 2.0)


def test_privleak_and_relative_difference():
    assert metrics.privleak(0.5) == 0.0
    assert metrics.privleak(0.75, 0.5) == pytest.approx(-50.0)
    assert metrics.privleak(0.2, 0.6) == pytest.approx(100.0)
    assert metrics.relative_difference(0.75, 0.5) == pytest.approx(50.0)
    # MUSE reports 1 - auc; the result is the same.
    ours, muse = metrics.privleak(0.3, 0.6), metrics.relative_difference(0.7, 0.4)
    assert ours == pytest.approx(muse)
    assert metrics.privleak(0.5, 1.0, eps=0.5) == pytest.approx(100.0)


def test_means():
    assert metrics.mean([True, False]) == 0.5
    assert metrics.mean([1.0, np.nan, 2.0], missing="skip") == 1.5
    assert metrics.harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert metrics.harmonic_mean([1.0, 0.0]) == 0.0


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([], [1.0]), "at least one value in members"),
        (lambda: metrics.auc([1.0], [np.nan]), "others without NaN, got 1 of 1"),
        (lambda: metrics.auc([[1.0]], [1.0]), "members with 1 axes"),
        (lambda: metrics.bootstrap(metrics.mean, key=KEY), "at least one sample"),
        (lambda: metrics.bootstrap(metrics.mean, [1.0], key=KEY, level=1.0), "< 1"),
        (lambda: metrics.bootstrap(metrics.mean, [], key=KEY), r"samples\[0\]"),
        (lambda: metrics.privleak(1.2), r"auc in \[0, 1\]"),
        (lambda: metrics.privleak(np.nan), r"auc in \[0, 1\]"),
        (lambda: metrics.privleak(0.5, 1.0), "got reference=0.0 and eps=0.0"),
        (lambda: metrics.relative_difference(1.0, 0.0), "reference=0.0"),
        (lambda: metrics.relative_difference(1.0, np.nan), "finite reference"),
        (lambda: metrics.mean([]), "at least one value in values"),
        (lambda: metrics.mean([np.nan]), "without NaN"),
        (lambda: metrics.mean([np.nan], missing="skip"), "at least one value"),
        (lambda: metrics.mean([1.0], missing="drop"), "'skip'"),
        (lambda: metrics.harmonic_mean([1.0, -0.5]), ">= 0, got -0.5"),
        (lambda: metrics.forget_quality([1.0], []), "value in retain_ratios"),
        (lambda: metrics.forget_quality([np.nan], [1.0]), "ratios without NaN"),
        (lambda: metrics.semeval(HALVES, 1.5, 0.4), r"mia_auc in \[0, 1\]"),
        (lambda: metrics.semeval(HALVES, 0.5, np.nan), r"mmlu in \[0, 1\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("term", "auc", "mmlu", "final"),
    [
        (0.5, 0.5, 0.3, (0.5 + 1 + 0.3) / 3),
        (0.5, 0.25, 0.3, (0.5 + 0.5 + 0.3) / 3),
        (0.5, 1.0, 0.3, (0.5 + 0 + 0.3) / 3),
        (0.0, 0.5005, 0.229, 0.4093333),  # a collapsed model
    ],
)
def test_semeval_final(term, auc, mmlu, final):
    found = metrics.semeval({**HALVES, TWELVE[3]: term}, auc, mmlu)
    assert found.final == pytest.approx(final, abs=1e-6)
    assert found.task_aggregate == term  # all halves give 1/2, one zero gives 0
    assert found.below_floor
    assert not metrics.semeval(HALVES, auc, mmlu, floor=0.0).below_floor
    with pytest.raises(KeyError, match="semeval_terms"):
        metrics.semeval({TWELVE[0]: 1.0}, auc, mmlu)


def test_semeval_terms():
    values = np.linspace(0, 1, 24)
    splits, tasks, kinds = zip(*(2 * TWELVE), strict=True)
    terms = metrics.semeval_terms(values, splits, tasks, kinds)
    for i, key in enumerate(TWELVE):
        mean = (values[i] + values[i + 12]) / 2
        assert terms[key] == pytest.approx(1 - mean if key[0] == "forget" else mean)
    with pytest.raises(ValueError, match="none of .*Task3"):
        metrics.semeval_terms(values[:5], splits[:5], tasks[:5], kinds[:5])
    with pytest.raises(ValueError, match="Did you mean 'retain'"):
        metrics.semeval_terms(values, ("retian", *splits[1:]), tasks, kinds)
    with pytest.raises(ValueError, match="for every value"):
        metrics.semeval_terms(values, splits[1:], tasks, kinds)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        metrics.semeval_terms(2 * values, splits, tasks, kinds)
