# SPDX-License-Identifier: Apache-2.0
"""The contract of metrics of arrays; a new one is a row. Goldens: tests/golden."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import metrics

NAN = np.nan
LN2, LN3, LN4 = np.log([2.0, 3.0, 4.0])


class Row(NamedTuple):
    """A metric, arguments for three examples, and the values by hand.

    Attributes:
        metric: called with the arguments and, where it takes one, `where`.
        args: arrays; floats may come in any precision.
        expected: [3], or more axes.
        where: mask of the arguments, None where the metric takes none.
        masked: positions of the arguments that the mask goes over.
    """

    metric: Callable
    args: tuple
    expected: Any
    where: Any = None
    masked: tuple[int, ...] = ()


# Log-probabilities of four tokens in three rows; the last row has no token.
LOGPS = -np.array([[1.0, 4.0, 2.0, 9.0], [9.0, 3.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
WHERE = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
HITS = np.array([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1]], bool)
RIGHT = np.log([2.0, 4.0, 8.0])
WRONG = np.log([[2.0, 8.0], [4.0, 4.0], [2.0, 2.0]])  # probabilities 1/2 and 1/8, ...
# Softmax 3/4, 1/4: log p has mean m and deviation sqrt(3/16) ln 3, so class 0 is
# 1/4 ln 3 above m and class 1 is 3/4 ln 3 below it.
QUARTERS = np.tile([LN3, 0.0], (3, 4, 1))
LABELS = np.array([[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
ABOVE, BELOW = 1 / np.sqrt(3), -np.sqrt(3)
SCORES = np.array([[5.0, 1.0, 0.0], [5.0, 4.0, 0.0], [5.0, 1.0, 3.0]])


def of_labels(metric, labels=LABELS):
    """A metric of logits and targets as one of logits."""
    return lambda logits, **how: metric(logits, jnp.asarray(labels), **how)


METRICS = {
    "mean_nll": Row(metrics.mean_nll, (LOGPS,), [7 / 3, 3.0, NAN], WHERE, (0,)),
    "mean_nll_lengths": Row(
        partial(metrics.mean_nll, lengths=np.array([7, 9, 2])),
        (LOGPS,),
        [1.0, 1.0, 0.0],
        WHERE,
        (0,),
    ),
    "probability": Row(
        metrics.probability, (LOGPS,), np.exp([-7 / 3, -3.0, NAN]), WHERE, (0,)
    ),
    "mia_loss": Row(metrics.mia_loss, (LOGPS,), [7 / 3, 3.0, NAN], WHERE, (0,)),
    # p + q is 1/2 + 5/8, 1/4 + 1/2 and 1/8 + 1.
    "probability_with_options": Row(
        metrics.probability_with_options, (RIGHT, WRONG), [4 / 9, 1 / 3, 1 / 9]
    ),
    "probability_with_options_eps": Row(
        partial(metrics.probability_with_options, eps=0.125),
        (RIGHT, WRONG),
        [0.4, 2 / 7, 0.1],
    ),
    # w is 1/4, 1/4, 1/2 and c 1/2, 1/4, 1/8.
    "truth_ratio": Row(metrics.truth_ratio, (RIGHT, WRONG), [0.5, 1.0, 4.0]),
    "truth_ratio_arithmetic": Row(
        partial(metrics.truth_ratio, mean="arithmetic"),
        (RIGHT, WRONG),
        [5 / 8, 1.0, 4.0],
    ),
    "truth_ratio_eps": Row(
        partial(metrics.truth_ratio, eps=0.125), (RIGHT, WRONG), [0.4, 2 / 3, 2.0]
    ),
    "truth_probability": Row(
        metrics.truth_probability, (RIGHT, WRONG), [2 / 3, 0.5, 0.2]
    ),
    "truth_probability_eps": Row(
        partial(metrics.truth_probability, eps=0.25),
        (RIGHT, WRONG),
        [0.5, 1 / 3, 1 / 7],
    ),
    "truth_score_closer": Row(
        partial(metrics.truth_score, better="closer_to_1_better"),
        (np.array([0.5, 1.0, 4.0]),),
        [0.5, 1.0, 0.25],
    ),
    "truth_score_true": Row(
        partial(metrics.truth_score, better="true_better"),
        (np.array([0.5, 1.0, 4.0]),),
        [0.5, 0.0, 0.0],
    ),
    "greedy_hits": Row(of_labels(metrics.greedy_hits), (QUARTERS,), LABELS == 0),
    "drop_last": Row(
        metrics.drop_last,
        (WHERE,),
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
    ),
    "exact_memorization": Row(
        metrics.exact_memorization, (HITS,), [2 / 3, 2 / 3, NAN], WHERE, (0,)
    ),
    # In row 0 the last token is a hit and the one before is not; in row 1 it is not.
    "extraction_strength": Row(
        metrics.extraction_strength, (HITS,), [1 / 3, 0.0, NAN], WHERE, (0,)
    ),
    "extraction_strength_compat": Row(
        partial(metrics.extraction_strength, compat="openunlearning"),
        (HITS,),
        [1 / 3, 1 / 3, 0.0],
        WHERE,
        (0,),
    ),
    "mia_reference": Row(metrics.mia_reference, (RIGHT, WRONG[:, 0]), [0, 0, LN4]),
    "mia_zlib": Row(metrics.mia_zlib, (RIGHT, np.array([1, 2, 3])), [LN2, LN2, LN2]),
    "mia_lowercase": Row(metrics.mia_lowercase, (RIGHT, WRONG[:, 0]), [1, 1, 3]),
    # int(0.7 * 3) is 2 of -1, -4, -2 and of -3, -5, -1.
    "mia_min_k": Row(
        partial(metrics.mia_min_k, k=0.7), (LOGPS,), [3.0, 4.0, NAN], WHERE, (0,)
    ),
    "mia_min_k_least": Row(
        partial(metrics.mia_min_k, k=0.1), (LOGPS,), [4.0, 5.0, NAN], WHERE, (0,)
    ),
    "mia_min_k_none": Row(
        partial(metrics.mia_min_k, k=0.1, min_tokens=0, empty=0.0),
        (LOGPS,),
        [0.0, 0.0, 0.0],
        WHERE,
        (0,),
    ),
    "standardised_logps": Row(
        of_labels(metrics.standardised_logps),
        (QUARTERS,),
        np.where(WHERE, np.where(LABELS == 0, ABOVE, BELOW), 0.0),
        WHERE,
        (0,),
    ),
    "mia_min_k_plus_plus": Row(
        of_labels(partial(metrics.mia_min_k_plus_plus, k=0.7)),
        (QUARTERS,),
        [-(ABOVE + BELOW) / 2, -BELOW, NAN],
        WHERE,
        (0,),
    ),
    "choice_accuracy": Row(
        of_labels(metrics.choice_accuracy, [0, 1, 2]), (SCORES,), [1.0, 0.0, 0.0]
    ),
    # Minus the means 5, 2 and 1.
    "choice_accuracy_calibrated": Row(
        of_labels(partial(metrics.choice_accuracy, calibrated=True), [0, 1, 2]),
        (SCORES,),
        [1.0, 1.0, 1.0],
    ),
    "choice_accuracy_lengths": Row(
        of_labels(
            partial(metrics.choice_accuracy, lengths=np.full((3, 3), [10, 1, 4])),
            [1, 1, 0],
        ),
        (SCORES,),
        [1.0, 1.0, 0.0],
    ),
    "choice_accuracy_where": Row(
        of_labels(metrics.choice_accuracy, [0, 1, 0]),
        (SCORES,),
        [1.0, 1.0, NAN],
        np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1]], bool),
        (0,),
    ),
    "class_probability": Row(
        partial(metrics.class_probability, class_id=1), (QUARTERS[0, :3],), [0.25] * 3
    ),
}
each = pytest.mark.parametrize("row", METRICS.values(), ids=METRICS)
masked = pytest.mark.parametrize(
    "row",
    [row for row in METRICS.values() if row.where is not None],
    ids=[name for name, row in METRICS.items() if row.where is not None],
)


def arrays(row, dtype=jnp.float32):
    return tuple(
        jnp.asarray(x, dtype) if np.asarray(x).dtype.kind == "f" else jnp.asarray(x)
        for x in row.args
    )


def mask(row):
    return {} if row.where is None else {"where": jnp.asarray(row.where)}


@each
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_hand_computed_value_of_every_example(row, wrap):
    value = wrap(row.metric)(*arrays(row), **mask(row))
    assert value.shape == np.shape(row.expected)
    np.testing.assert_allclose(value, row.expected, rtol=3e-6, atol=1e-6)


@masked
def test_masked_entries_change_nothing(row):
    clean = row.metric(*arrays(row), **mask(row))
    junk = (True,) if row.args[0].dtype == bool else (NAN, np.inf, -np.inf, 3e38)
    for value in junk:
        dirty = [
            jnp.where(_over(row.where, x), x, jnp.asarray(value, x.dtype))
            if i in row.masked
            else x
            for i, x in enumerate(arrays(row))
        ]
        np.testing.assert_array_equal(row.metric(*dirty, **mask(row)), clean)


@masked
def test_padding_changes_nothing(row):
    if row.where.shape[-1] == 3:
        return  # columns are options, not tokens
    clean = row.metric(*arrays(row), **mask(row))
    if clean.shape != (3,):
        return  # a value per token, as long as the row

    def padded(x, value):
        x = np.asarray(x)
        return np.concatenate([x, np.full_like(x, value)], axis=1)

    how = row.metric
    if row.args[0].ndim == 3:
        how = of_labels(
            partial(metrics.mia_min_k_plus_plus, k=0.7), padded(LABELS, -100)
        )
    value = how(*(padded(x, 1) for x in arrays(row)), where=padded(row.where, False))
    np.testing.assert_allclose(value, clean, rtol=1e-6)


@each
def test_a_value_does_not_depend_on_the_batch(row):
    args, how = arrays(row), mask(row)
    keywords = getattr(row.metric, "keywords", {})
    if "lengths" in keywords or getattr(row.metric, "__name__", "") == "<lambda>":
        return  # has other arrays in its closure
    whole = row.metric(*args, **how)
    for i in range(3):
        alone = row.metric(*(x[i] for x in args), **{k: x[i] for k, x in how.items()})
        np.testing.assert_allclose(alone, whole[i], rtol=1e-6)
    stacked = row.metric(
        *(jnp.stack([x, x]) for x in args),
        **{k: jnp.stack([x, x]) for k, x in how.items()},
    )
    np.testing.assert_allclose(stacked, jnp.stack([whole, whole]), rtol=1e-6)


def _over(where, x):
    return where if where.ndim == x.ndim else where[..., None]


@masked
def test_a_mask_that_is_not_boolean_or_of_another_shape(row):
    with pytest.raises(TypeError, match="boolean where"):
        row.metric(*arrays(row), where=jnp.ones(row.where.shape))
    with pytest.raises(ValueError, match="one shape"):
        row.metric(*arrays(row), where=jnp.ones((7, 7), bool))


@each
def test_float64_stays_float64_and_bfloat16_becomes_float32(row):
    if not any(np.asarray(x).dtype.kind == "f" for x in row.args):
        return
    low = row.metric(*arrays(row, jnp.bfloat16), **mask(row))
    assert low.dtype in (jnp.float32, jnp.bool_)
    with jax.enable_x64(True):
        value = row.metric(*arrays(row, jnp.float64), **mask(row))
        np.testing.assert_allclose(value, row.expected, rtol=1e-6, atol=1e-9)
        counts = ("choice_accuracy", "greedy_hits")
        if not any(row is METRICS[name] for name in METRICS if name.startswith(counts)):
            assert value.dtype == jnp.float64


def test_every_metric_of_arrays_has_a_row():
    host = set(
        "auc bootstrap exact_match truncate_at_stop forget_quality harmonic_mean mean "
        "mia_gradnorm model_utility privleak relative_difference rouge semeval "
        "semeval_terms tofu_ratios tofu_scores zlib_lengths "
        "ForgetQuality Interval SemEval TofuRows Logistic Threshold attack_accuracy "
        "attack_members attack_threshold logistic_regression overfitting_metric "
        "stratified_splits unlearning_metric".split()
    )
    arrays = set(metrics.__all__) - host
    rows = {n for n in arrays if any(row.startswith(n) for row in METRICS)}
    assert arrays == rows
    assert host < set(metrics.__all__)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mia_min_k(LOGPS, k=0.0), "k > 0"),
        (lambda: metrics.mia_min_k(LOGPS, k=1.5), "k <= 1"),
        (lambda: metrics.mia_min_k(LOGPS, min_tokens=2), "min_tokens to be 0 or 1"),
        (lambda: metrics.truth_ratio(RIGHT, WRONG, mean="median"), "'geometric'"),
        (lambda: metrics.truth_ratio(RIGHT, WRONG, eps=-1), "eps >= 0"),
        (lambda: metrics.truth_ratio(RIGHT, RIGHT), "one shape"),
        (lambda: metrics.truth_ratio(RIGHT, WRONG[:, :0]), "K >= 1"),
        (lambda: metrics.truth_score(RIGHT, better="closer"), "closer_to_1_better"),
        (lambda: metrics.extraction_strength(HITS, compat="tofu"), "compat"),
        (lambda: metrics.mean_nll(LOGPS, lengths=np.ones(2)), "one shape"),
        (lambda: metrics.mia_zlib(RIGHT, np.ones(2)), "one shape"),
        (lambda: metrics.greedy_hits(QUARTERS, LABELS[:2]), "one shape"),
        (lambda: metrics.class_probability(QUARTERS, 2), "class_id=2"),
        (lambda: metrics.choice_accuracy(SCORES[:0], np.zeros(0, int)), "K >= 1"),
        (lambda: metrics.choice_accuracy(SCORES, np.zeros(2, int)), "one shape"),
        (lambda: metrics.standardised_logps(QUARTERS, LABELS, floor=0), "floor > 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nan_inputs_give_nan():
    """A diverged model never gets a good score."""
    bad = jnp.asarray(LOGPS).at[0, 0].set(NAN)
    for metric in (metrics.mean_nll, metrics.mia_min_k):
        assert np.isnan(metric(bad)).tolist() == [True, False, False]
    logits = jnp.asarray(QUARTERS).at[0, 0, 1].set(NAN)
    assert not metrics.greedy_hits(logits, jnp.ones((3, 4), jnp.int32))[0, 0]
    scores = jnp.asarray(SCORES).at[0, 0].set(NAN)
    found = metrics.choice_accuracy(scores, jnp.array([0, 7, 2]))
    np.testing.assert_array_equal(found, [NAN, NAN, 0.0])
    outside = metrics.standardised_logps(QUARTERS, np.full((3, 4), -100))
    assert np.isnan(outside).all()


def test_min_k_counts_as_python_does():
    logps = -np.tile(np.arange(1.0, 31.0), (30, 1))
    where = np.tri(30, dtype=bool)  # row n - 1 has n tokens
    for k in (0.1, 0.3, 0.7):
        wanted = [
            np.arange(n + 1.0)[-max(1, int(k * n)) :].mean() for n in range(1, 31)
        ]
        found = metrics.mia_min_k(logps, k=k, where=where)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(("p", "wanted"), [(1, 7.0), (2, 5.0), (np.inf, 4.0)])
def test_gradnorm_is_the_mean_over_tensors(p, wanted):
    # Norms of 3, 4 are 7, 5 and 4.
    gradient = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[3.0, 4.0]]), "c": None}
    found = jax.jit(partial(metrics.mia_gradnorm, p=p))(gradient)
    np.testing.assert_allclose(found, wanted)


def test_gradnorm_of_stacked_layers_counts_each():
    layers = jnp.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    apart = {str(i): layer for i, layer in enumerate(layers)}
    rest = {"head": jnp.ones((2, 2))}
    wanted = metrics.mia_gradnorm({"blocks": apart, **rest})
    stacked = {"blocks": {"kernel": layers}, **rest}
    found = metrics.mia_gradnorm(stacked, stacked=r"blocks/.*")
    np.testing.assert_allclose(found, wanted)
    np.testing.assert_allclose(found, (5 + 1 + 0 + 2) / 4)
    assert metrics.mia_gradnorm(stacked) != found


@pytest.mark.parametrize(
    ("gradient", "how", "message"),
    [
        ({}, {}, "at least one leaf"),
        ({"a": np.ones(2)}, {"p": 0.5}, "p >= 1"),
        ({"a": np.ones(2)}, {"stacked": "blocks"}, "stacked='blocks'.*'a'"),
    ],
)
def test_gradnorm_errors(gradient, how, message):
    with pytest.raises(ValueError, match=message):
        metrics.mia_gradnorm(gradient, **how)
