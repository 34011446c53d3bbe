# SPDX-License-Identifier: Apache-2.0
"""Overlap of generated and reference texts: ROUGE and exact match, on the host."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from jaxunlearn import _checks, _text

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKENIZERS = ("unicode", "ascii")

Tokenizer = Callable[[str], Sequence[str]]


def rouge(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    rouge_types: Sequence[str] = ("rouge1", "rougeL"),
    stem: bool = True,
    tokenizer: str | Tokenizer = "unicode",
) -> dict[str, np.ndarray]:
    """ROUGE of each candidate and its reference, by the library rouge-score.

    Args:
        candidates: n generated texts; see `truncate_at_stop`.
        references: n reference texts.
        rouge_types: "rouge1", "rouge2", "rougeL" or "rougeLsum".
        stem: whether English words (those of a-z and 0-9) are stemmed first (Porter),
            as in OpenUnlearning, TOFU and SemEval; MUSE's code does not.
        tokenizer: what a word is. "unicode": a run of letters and digits of any script,
            with their accents and vowel marks; case, width and composition of accents
            are ignored. In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer,
            Burmese) each character is a word; in Korean, what stands between spaces.
            "ascii": a run of a-z and 0-9, as in rouge-score and so in published
            numbers: it splits "Müller" into "m" and "ller" and finds no word in most
            scripts. Both give the same values where all letters are ASCII. A function
            from a text to its words is used as it is, without stemming.
    Returns:
        `<type>_recall` (TOFU and SemEval use that of rougeL), `<type>_precision` and
        `<type>_f1` (MUSE), each [n] float64 in [0, 1].
    Raises:
        TypeError: if an argument is one text. ValueError: if the numbers of texts
            differ or are 0, or a type or tokenizer is unknown. ModuleNotFoundError: if
            rouge-score is missing.
    Warns:
        UserWarning: if references that are not empty have no word, so that the scores
            are 0 even for an identical candidate, or if "ascii" drops most letters.
    References: Lin 2004, https://aclanthology.org/W04-1013
    """
    candidates, references = _texts("rouge", candidates, references)
    rouge_types = [rouge_types] if isinstance(rouge_types, str) else list(rouge_types)
    for rouge_type in rouge_types:
        _checks.one_of("rouge", ROUGE_TYPES, rouge_types=rouge_type)
    if not callable(tokenizer):
        _checks.one_of("rouge", TOKENIZERS, tokenizer=tokenizer)
    library = _checks.library("rouge", "rouge_score.rouge_scorer", "metrics")
    words = _words(tokenizer, stem)
    lost = [
        row
        for row, text in enumerate(references)
        if text.strip()
        and (not words.tokenize(text) or tokenizer == "ascii" and not _is_latin(text))
    ]
    if lost:
        warnings.warn(
            f"rouge with tokenizer={tokenizer!r} finds no word, or only few of the "
            f"letters, in {len(lost)} of {len(references)} references, the first "
            f"{references[lost[0]][:60]!r} in row {lost[0]}. Low scores there do not "
            "mean that an answer is forgotten. Pass tokenizer='unicode', or a function "
            "that splits such texts into words.",
            stacklevel=2,
        )
    scorer = library.RougeScorer(rouge_types, tokenizer=words)
    scored = [scorer.score(r, c) for c, r in zip(candidates, references, strict=True)]
    return {
        f"{rouge_type}_{name}": np.array(
            [getattr(each[rouge_type], field) for each in scored]
        )
        for rouge_type in rouge_types
        for name, field in (
            ("recall", "recall"),
            ("precision", "precision"),
            ("f1", "fmeasure"),
        )
    }


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string, without outer white space.

    Raises:
        TypeError: if `stops` is one text. ValueError: for an empty stop string.
    """
    if isinstance(stops, str):
        raise TypeError(
            "truncate_at_stop needs a sequence of stop strings, got one text."
        )
    if "" in stops:
        raise ValueError(
            "truncate_at_stop needs stop strings of at least one character, got '' at "
            f"index {list(stops).index('')}. Remove it."
        )
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def exact_match(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Whether each candidate equals its reference, up to case and outer white space.

    This is SemEval's score of an answer: any text after the correct answer makes it
    wrong. Accents count, but not how they are composed, and characters that show
    nothing do not count.

    Args:
        candidates: n generated texts.
        references: n reference texts.
    Returns:
        [n] float64, 1 or 0.
    Raises:
        TypeError: if an argument is one text. ValueError: if the numbers of texts
            differ or are 0.
    """
    pair = _texts("exact_match", candidates, references)
    same = [_text.caseless(a) == _text.caseless(b) for a, b in zip(*pair, strict=True)]
    return np.array(same, np.float64)


def _texts(owner, candidates, references):
    _checks.texts(owner, candidates=candidates, references=references)
    candidates, references = list(candidates), list(references)
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{owner} needs as many candidates as references and at least one, got "
            f"{len(candidates)} and {len(references)}."
        )
    return candidates, references


class _Words:
    """A tokenizer with the interface of rouge-score's."""

    def __init__(self, split: Tokenizer):
        self.tokenize = split


def _is_latin(text: str) -> bool:
    """Whether at least half of the letters and digits are ASCII."""
    letters = "".join(_text.words(text))
    return 2 * sum(map(str.isascii, letters)) >= len(letters)


def _words(tokenizer: str | Tokenizer, stem: bool) -> _Words:
    if callable(tokenizer):
        return _Words(lambda text: list(tokenizer(text)))
    library = _checks.library("rouge", "rouge_score.tokenizers", "metrics")
    english = library.DefaultTokenizer(stem).tokenize
    if tokenizer == "ascii":
        return _Words(english)

    def split(text):
        found = []
        for word in _text.words(text):
            found += english(word) if word.isascii() else [word]
        return found

    return _Words(split)
