# SPDX-License-Identifier: Apache-2.0
"""Overlap of generated and reference texts: ROUGE and exact match, on the host."""

from collections.abc import Sequence

import numpy as np

from jaxunlearn import _checks

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    rouge_types: Sequence[str] = ("rouge1", "rougeL"),
    stem: bool = True,
) -> dict[str, np.ndarray]:
    """ROUGE of each candidate and its reference, by the library rouge-score.

    Args:
        candidates: n generated texts; see `truncate_at_stop`.
        references: n reference texts.
        rouge_types: "rouge1", "rouge2", "rougeL" or "rougeLsum".
        stem: whether words are stemmed first (Porter), as in OpenUnlearning, TOFU and
            SemEval; MUSE's code does not.
    Returns:
        `<type>_recall` (TOFU and SemEval use that of rougeL), `<type>_precision` and
        `<type>_f1` (MUSE), each [n] float64 in [0, 1].
    Raises:
        TypeError: if an argument is one text. ValueError: if the numbers of texts
            differ or are 0, or a type is unknown. ModuleNotFoundError: if rouge-score
            is missing.
    References: Lin 2004, https://aclanthology.org/W04-1013
    """
    candidates, references = _texts("rouge", candidates, references)
    rouge_types = [rouge_types] if isinstance(rouge_types, str) else list(rouge_types)
    for rouge_type in rouge_types:
        _checks.one_of("rouge", ROUGE_TYPES, rouge_types=rouge_type)
    scorer = _checks.library("rouge", "rouge_score.rouge_scorer", "metrics")
    scorer = scorer.RougeScorer(rouge_types, use_stemmer=stem)
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
    """The text before the first stop string, without outer white space."""
    if isinstance(stops, str):
        raise TypeError(
            "truncate_at_stop needs a sequence of stop strings, got one text."
        )
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def exact_match(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Whether each candidate equals its reference, up to case and outer white space.

    This is SemEval's score of an answer: any text after the correct answer makes it
    wrong.

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
    same = [a.strip().lower() == b.strip().lower() for a, b in zip(*pair, strict=True)]
    return np.array(same, np.float64)


def _texts(owner, candidates, references):
    if isinstance(candidates, str) or isinstance(references, str):
        raise TypeError(f"{owner} needs sequences of texts, got one text.")
    candidates, references = list(candidates), list(references)
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{owner} needs as many candidates as references and at least one, got "
            f"{len(candidates)} and {len(references)}."
        )
    return candidates, references
