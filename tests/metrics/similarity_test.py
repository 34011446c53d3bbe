# SPDX-License-Identifier: Apache-2.0
"""ROUGE, truncation, exact match and compressed lengths."""

import zlib

import numpy as np
import pytest

from jaxunlearn import metrics


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # Three of the four words match, two of them in order (cat sat or the cat).
    found = metrics.rouge(["sat the cat"], ["the cat sat down"], stem=False)
    assert found["rouge1_recall"] == pytest.approx([3 / 4])
    assert found["rouge1_precision"] == pytest.approx([1.0])
    assert found["rougeL_recall"] == pytest.approx([2 / 4])
    assert found["rougeL_precision"] == pytest.approx([2 / 3])
    assert found["rougeL_f1"] == pytest.approx([4 / 7])


def test_stemming_and_rouge_types():
    pytest.importorskip("rouge_score")
    pair = ["she explores memories"], ["She explored memory."]
    kinds = ("rouge1", "rouge2")
    found = metrics.rouge(*pair, rouge_types=kinds)
    assert set(found) == {
        f"{k}_{n}" for k in kinds for n in ("recall", "precision", "f1")
    }
    assert found["rouge1_recall"] == pytest.approx([1.0])
    plain = metrics.rouge(*pair, rouge_types=kinds, stem=False)
    assert plain["rouge1_recall"] == pytest.approx([1 / 3])
    assert metrics.rouge([""], ["a"])["rougeL_recall"] == [0.0]


def test_truncation_is_at_the_first_stop():
    assert (
        metrics.truncate_at_stop(" Lima \n\nQuestion: Where?", ["Question:", "\n\n"])
        == "Lima"
    )
    assert metrics.truncate_at_stop(" Lima ", []) == "Lima"


def test_exact_match():
    found = metrics.exact_match([" Lima\n", "lima, Peru", ""], ["lima", "Lima", " "])
    np.testing.assert_array_equal(found, [1.0, 0.0, 1.0])


def test_zlib_lengths():
    texts = ["aaaaaaaaaaaaaaaaaaaaaaaa", "qwertzuiopasdfghjklyxcvb", "é"]
    found = metrics.zlib_lengths(texts)
    assert found[0] < found[1]
    assert zlib.decompress(zlib.compress("é".encode())) == b"\xc3\xa9"
    assert found[2] == len(zlib.compress(b"\xc3\xa9"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.rouge("a", ["a"]), TypeError, "sequences of texts"),
        (lambda: metrics.rouge(["a"], ["a", "b"]), ValueError, "got 1 and 2"),
        (lambda: metrics.rouge([], []), ValueError, "at least one"),
        (
            lambda: metrics.rouge(["a"], ["a"], rouge_types=["rougel"]),
            ValueError,
            "'rougeL'",
        ),
        (
            lambda: metrics.truncate_at_stop("a", "\n"),
            TypeError,
            "sequence of stop strings",
        ),
        (lambda: metrics.exact_match(["a"], []), ValueError, "got 1 and 0"),
        (lambda: metrics.zlib_lengths("a"), TypeError, "sequence of texts"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
