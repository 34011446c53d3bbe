# SPDX-License-Identifier: Apache-2.0
"""How much of a text a generated one says: ROUGE and exact match, on the host."""

from collections.abc import Sequence

import numpy as np

from jaxunlearn import _checks

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    kinds: Sequence[str] = ("rouge1", "rougeL"),
    stem: bool = True,
) -> dict[str, np.ndarray]:
    """ROUGE of each candidate with its reference, by the library rouge-score.

    Args:
        candidates: n generated texts; see `truncate_at_stop`.
        references: n texts that they should say.
        kinds: "rouge1", "rouge2", "rougeL" or "rougeLsum".
        stem: reduce words to their stems first (Porter), as OpenUnlearning, TOFU and
            SemEval do; MUSE's code does not.
    Returns:
        `<kind>_recall` (TOFU and SemEval read that of rougeL), `<kind>_precision` and
        `<kind>_f1` (MUSE), each [n] float64 in [0, 1].
    Raises:
        TypeError: if one text came where a sequence was needed. ValueError: if the two
            differ in number, are empty, or a kind is unknown. ModuleNotFoundError: if
            rouge-score is missing.
    References: Lin 2004, https://aclanthology.org/W04-1013
    """
    candidates, references = _texts("rouge", candidates, references)
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        _checks.one_of("rouge", KINDS, kinds=kind)
    scorer = _checks.library("rouge", "rouge_score.rouge_scorer", "metrics")
    scorer = scorer.RougeScorer(kinds, use_stemmer=stem)
    scored = [scorer.score(r, c) for c, r in zip(candidates, references, strict=True)]
    return {
        f"{kind}_{name}": np.array([getattr(each[kind], field) for each in scored])
        for kind in kinds
        for name, field in (
            ("recall", "recall"),
            ("precision", "precision"),
            ("f1", "fmeasure"),
        )
    }


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """A generated text up to the first of any stop word, without outer white space."""
    if isinstance(stops, str):
        raise TypeError(
            "truncate_at_stop needs a sequence of stop words, got one text."
        )
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def exact_match(candidates: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[n] float64, 1 where the texts are equal but for case and outer white space.

    SemEval's score of an answer: what follows the right answer makes it wrong.

    Raises:
        TypeError: if one text came where a sequence was needed. ValueError: if the two
            differ in number or are empty.
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
