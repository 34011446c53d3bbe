# SPDX-License-Identifier: Apache-2.0
"""ROUGE, truncation, exact match and compressed lengths."""

import random
import string
import warnings
import zlib

import numpy as np
import pytest

from jaxunlearn import metrics
from tests.text_test import TEXTS


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


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_rouge_of_the_same_text_is_1_in_every_script(text, kind):
    pytest.importorskip("rouge_score")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.rouge([text, text[:5]], [text, text], rouge_types=kind)
    for name in ("recall", "precision", "f1"):
        assert found[f"{kind}_{name}"][0] == 1 > found[f"{kind}_f1"][1]


def test_accents_and_vowel_marks_make_other_words():
    pytest.importorskip("rouge_score")
    found = metrics.rouge(["Müller", "दल्ला", "か"], ["Möller", "दिल्ली", "が"])
    np.testing.assert_array_equal(found["rougeL_recall"], 0.0)
    ascii_words = metrics.rouge(["Müller"], ["Möller"], tokenizer="ascii")
    assert ascii_words["rougeL_recall"] == [1.0]


def test_rouge_of_english_is_that_of_the_library():
    library = pytest.importorskip("rouge_score.rouge_scorer")
    draw, symbols = random.Random(0), "“”‘’—…€™²½•🙂" + string.punctuation
    words = "running runs 42nd don’t I the of cities city's generalizations a".split()

    def text():
        return "".join(draw.choice(words) + draw.choice(symbols) + " " for _ in "x" * 9)

    for stem in (True, False):
        for _ in range(20):
            candidate, reference = text(), text()
            wanted = library.RougeScorer(["rouge1", "rougeL"], use_stemmer=stem)
            wanted = wanted.score(reference, candidate)
            for tokenizer in ("unicode", "ascii"):
                found = metrics.rouge(
                    [candidate], [reference], stem=stem, tokenizer=tokenizer
                )
                for kind, score in wanted.items():
                    assert found[f"{kind}_recall"] == score.recall
                    assert found[f"{kind}_f1"] == score.fmeasure


def test_references_without_words_are_warned_of():
    pytest.importorskip("rouge_score")
    with pytest.warns(UserWarning, match="row 1"):
        metrics.rouge(["a", "🙂"], ["a", "🙂"])
    with pytest.warns(UserWarning, match="1 of 2 references.*'Москва 1147'.*row 0"):
        metrics.rouge(["a", "a"], ["Москва 1147", "a"], tokenizer="ascii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.rouge(["🙂"], [""])
        found = metrics.rouge(["🙂 b"], ["🙂 a"], tokenizer=str.split)
    assert found["rouge1_recall"] == [0.5]


def test_truncation_is_at_the_first_stop():
    assert (
        metrics.truncate_at_stop(" Lima \n\nQuestion: Where?", ["Question:", "\n\n"])
        == "Lima"
    )
    assert metrics.truncate_at_stop(" Lima ", []) == "Lima"
    with pytest.raises(ValueError, match="got '' at index 1"):
        metrics.truncate_at_stop("Lima", ["x", ""])


def test_exact_match():
    found = metrics.exact_match([" Lima\n", "lima, Peru", ""], ["lima", "Lima", " "])
    np.testing.assert_array_equal(found, [1.0, 0.0, 1.0])
    found = metrics.exact_match(
        ["É", "STRASSE", "\u200fפריז"], ["e\u0301", "Straße", "פריז"]
    )
    np.testing.assert_array_equal(found, 1.0)
    assert metrics.exact_match(["Müller"], ["Möller"]) == [0.0]


def test_zlib_lengths():
    texts = ["aaaaaaaaaaaaaaaaaaaaaaaa", "qwertzuiopasdfghjklyxcvb", "é"]
    found = metrics.zlib_lengths(texts)
    assert found[0] < found[1]
    assert zlib.decompress(zlib.compress("é".encode())) == b"\xc3\xa9"
    assert found[2] == len(zlib.compress(b"\xc3\xa9"))
    assert metrics.zlib_lengths(["\ud83d"]) == len(zlib.compress(b"\xed\xa0\xbd"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.rouge("a", ["a"]), TypeError, "list of texts"),
        (lambda: metrics.rouge(["a"], ["a", "b"]), ValueError, "got 1 and 2"),
        (lambda: metrics.rouge([], []), ValueError, "at least one"),
        (
            lambda: metrics.rouge(["a"], ["a"], rouge_types=["rougel"]),
            ValueError,
            "'rougeL'",
        ),
        (
            lambda: metrics.rouge(["a"], ["a"], tokenizer="words"),
            ValueError,
            "tokenizer='words'",
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
