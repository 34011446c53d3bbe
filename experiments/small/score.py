# SPDX-License-Identifier: Apache-2.0
"""What a model in the small world still knows, and how close it is to retraining.

For every scored row the right answer, its paraphrase and the wrong ones are scored by
teacher forcing; one forward pass over all of them gives everything here.

* probability: exp(mean log-probability of an answer token), of the right answer;
* exact: whether greedy decoding gives the complete answer (every token is the most
  probable one after the right ones before it, which is the same thing);
* match: fraction of answer tokens that are the most probable one;
* truth ratio: probability of a wrong answer (geometric mean of them) over that of the
  paraphrase; 1 for a model without the knowledge.

Forget quality is the p-value of a two-sample Kolmogorov-Smirnov test between truth
ratios of the forget rows under the model and under the retrained one (Maini et al.,
"TOFU", arXiv 2401.06121): near 1 where they cannot be told apart. Utility is the
harmonic mean of three numbers over the retain rows: probability, match (in the place of
TOFU's ROUGE-L) and the mean of max(0, 1 - truth ratio).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.small import questions
from experiments.small.world import World
from jaxunlearn import evaluate, metrics
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

ROWS = {"forget": 72, "retain": 48}
WRONG = 3
BATCH = 40


class Scorer(NamedTuple):
    """The rows that are scored in one world, and the retrained model's truth ratios.

    Attributes:
        model: the world's.
        table: every answer of every row: right, paraphrased and wrong.
        counts: kind of rows -> number of rows.
        wrong: wrong answers of each row.
        retrained: truth ratios of the retrained model on the forget rows.
    """

    model: Model
    table: table.Table
    counts: Mapping[str, int]
    wrong: int
    retrained: np.ndarray


def scorer(
    world: World, *, rows: Mapping[str, int] = ROWS, wrong: int = WRONG
) -> Scorer:
    """The scorer of a world; it always scores the same rows.

    Args:
        world: whose questions are scored.
        rows: how many of each kind at most, the first that have wrong answers.
        wrong: wrong answers of each row.
    """
    counts, tables = {}, []
    for kind, limit in rows.items():
        scored = [r for r in world.questions[kind] if "perturbed_answer" in r][:limit]
        counts[kind] = len(scored)
        columns = zip(
            *(questions.answers(row)[: 2 + wrong] for row in scored), strict=True
        )
        for answers in columns:
            length = world.about["length"]
            tables.append(
                questions.encode(world.tokenizer, scored, answers, length=length)
            )
    made = Scorer(world.model, table.concat(tables), counts, wrong, np.zeros(0))
    ratios = per_row(made, world.retrained)["forget"]["truth_ratio"]
    return made._replace(retrained=ratios)


def per_row(scorer: Scorer, params: Params) -> dict[str, dict[str, np.ndarray]]:
    """By kind: `probability`, `exact`, `match` and `truth_ratio`, each [rows].

    Where a model gives NaN its answers have probability 0 and a truth ratio of 1.
    """
    scores = evaluate.token_scores(scorer.model, params, scorer.table, batch_size=BATCH)
    nll = metrics.mean_nll(scores.logps, where=scores.where)
    match = metrics.exact_memorization(scores.hits, where=scores.where)
    nll, match = np.nan_to_num(nll, nan=np.inf), np.asarray(match)
    found, start = {}, 0
    for kind, count in scorer.counts.items():
        end = start + count * (2 + scorer.wrong)
        right, paraphrase, *wrong = nll[start:end].reshape(2 + scorer.wrong, count)
        matches = match[start : start + count]
        ratio = np.asarray(metrics.truth_ratio(paraphrase, np.stack(wrong, -1)))
        found[kind] = {
            "probability": np.exp(-right),
            "exact": matches == 1.0,
            "match": matches,
            "truth_ratio": np.nan_to_num(ratio, nan=1.0),
        }
        start = end
    return found


def summary(scorer: Scorer, params: Params) -> dict[str, float]:
    """Means over rows, forget quality and utility.

    `forget_nll` is minus the mean log-probability of a token of the forgotten answers,
    averaged over rows; `distance` the Kolmogorov-Smirnov statistic that forget quality
    comes from, in [0, 1] and 0 for the retrained model.
    """
    return summary_of(scorer, per_row(scorer, params))


def summary_of(
    scorer: Scorer, found: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """`summary` of what `per_row` returned."""
    forget, retain = found["forget"], found["retain"]
    means = {
        f"{kind}_{name}": float(np.mean(values))
        for kind, each in found.items()
        for name, values in each.items()
    }
    test = metrics.forget_quality(forget["truth_ratio"], scorer.retrained)
    truth = metrics.truth_score(retain["truth_ratio"], better="true_better")
    parts = (retain["probability"], retain["match"], truth)
    parts = [float(np.asarray(part, np.float64).mean()) for part in parts]
    floor = np.finfo(np.float32).tiny
    return means | {
        "forget_nll": float(-np.mean(np.log(forget["probability"] + floor))),
        "forget_quality": float(test.pvalue),
        "distance": float(test.statistic),
        "utility": metrics.harmonic_mean(parts),
    }


def chosen_options(
    model: Model, params: Params, options: table.Table, count: int
) -> np.ndarray:
    """[n] int: the most probable of each question's `count` answers.

    Args:
        model, params: what is scored.
        options: [n * count] rows, the answers of one question one after another.
        count: answers of a question.
    Returns:
        The index of the answer with the highest mean log-probability of a token; where
        a model gives NaN the answer is never chosen, -1 if all are NaN.
    """
    scores = evaluate.token_scores(model, params, options, batch_size=BATCH)
    nll = metrics.mean_nll(scores.logps, where=scores.where)
    nll = np.nan_to_num(nll, nan=np.inf).reshape(-1, count)
    return np.where(np.isfinite(nll).any(1), nll.argmin(1), -1)


def in_words(summary: Mapping[str, float]) -> str:
    """A summary as a line of text."""
    return (
        f"forget probability {summary['forget_probability']:.3f}, exact "
        f"{summary['forget_exact']:.0%}; retain probability "
        f"{summary['retain_probability']:.3f}, exact {summary['retain_exact']:.0%}; "
        f"forget quality {summary['forget_quality']:.2g}, utility "
        f"{summary['utility']:.3f}"
    )
