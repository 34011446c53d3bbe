# SPDX-License-Identifier: Apache-2.0
"""What a model in the small world still knows, and how close it is to the twin.

For every scored row the right answer, its paraphrase and the wrong ones are scored by
teacher forcing; one forward pass over all of them gives everything here.

* probability: exp(mean log-probability of an answer token), of the right answer;
* exact: whether greedy decoding gives the whole answer (every token is the likeliest
  after the right ones before it, which is the same thing);
* match: share of answer tokens that are the likeliest one;
* truth ratio: probability of a wrong answer (geometric mean of them) over that of the
  paraphrase; 1 for who does not know.

Forget quality is the p-value of a two-sample Kolmogorov-Smirnov test between truth
ratios of the forget rows under the model and under the twin (Maini et al., "TOFU",
arXiv 2401.06121): near 1 where they cannot be told apart. Utility is the harmonic mean
of three numbers over the retain rows: probability, match (in the place of TOFU's
ROUGE-L) and the mean of max(0, 1 - truth ratio).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.small import questions
from experiments.small.world import World
from jaxunlearn import evaluate, metrics
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

ROWS = {"forget": 72, "retain": 48}
WRONG = 3
BATCH = 40


class Judge(NamedTuple):
    """The rows that are asked in one world, and what its twin says of them.

    Attributes:
        model: the world's.
        table: every answer of every row, right, other and wrong.
        asked: kind -> rows.
        wrong: wrong answers of each row.
        twin: truth ratios of the twin for the forget rows.
    """

    model: Model
    table: table.Table
    asked: Mapping[str, int]
    wrong: int
    twin: np.ndarray


def judge(world: World, *, rows: Mapping[str, int] = ROWS, wrong: int = WRONG) -> Judge:
    """The judge of a world; it always asks the same rows.

    Args:
        world: whose questions are asked.
        rows: how many of each kind at most, the first that can be scored.
        wrong: wrong answers of each row.
    """
    length = world.about["length"]
    asked, tables = {}, []
    for kind, most in rows.items():
        scored = [r for r in world.questions[kind] if "perturbed_answer" in r]
        scored = scored[:most]
        asked[kind] = len(scored)
        for pick in _answers(wrong):
            tables.append(
                questions.encode(
                    world.tokenizer, scored, list(map(pick, scored)), length=length
                )
            )
    made = Judge(world.model, table.concat(tables), asked, wrong, np.zeros(0))
    twin = by_row(made, world.twin)["forget"]["truth_ratio"]
    return made._replace(twin=twin)


def by_row(judge: Judge, params: Params) -> dict[str, dict[str, np.ndarray]]:
    """By kind: `probability`, `exact`, `match` and `truth_ratio`, each [rows].

    Where a model gives NaN its answers have probability 0 and none is preferred.
    """
    scores = evaluate.token_scores(judge.model, params, judge.table, batch_size=BATCH)
    nll = metrics.mean_nll(scores.logps, where=scores.where)
    match = metrics.exact_memorization(scores.hits, where=scores.where)
    nll = np.nan_to_num(nll, nan=np.inf)  # a broken model says nothing
    match = np.asarray(match)
    found, start = {}, 0
    for kind, count in judge.asked.items():
        end = start + count * (2 + judge.wrong)
        right, other, *bad = nll[start:end].reshape(2 + judge.wrong, count)
        own = match[start : start + count]
        ratio = np.asarray(metrics.truth_ratio(other, np.stack(bad, -1)))
        found[kind] = {
            "probability": np.exp(-right),
            "exact": own == 1.0,
            "match": own,
            "truth_ratio": np.nan_to_num(ratio, nan=1.0),
        }
        start = end
    return found


def summary(judge: Judge, params: Params) -> dict[str, float]:
    """Means over rows, forget quality and utility.

    `forget_nll` is minus the mean log-probability of a token of the forgotten answers,
    averaged over rows; `distance` the Kolmogorov-Smirnov statistic that forget quality
    comes from, in [0, 1] and 0 at the twin.
    """
    return summary_of(judge, by_row(judge, params))


def summary_of(
    judge: Judge, found: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """`summary` of what `by_row` found."""
    forget, retain = found["forget"], found["retain"]
    means = {
        f"{kind}_{name}": float(np.mean(values))
        for kind, each in found.items()
        for name, values in each.items()
    }
    test = metrics.forget_quality(forget["truth_ratio"], judge.twin)
    truth = metrics.truth_score(retain["truth_ratio"], better="true_better")
    parts = (retain["probability"], retain["match"], truth)
    floor = np.finfo(np.float32).tiny
    return means | {
        "forget_nll": float(-np.mean(np.log(forget["probability"] + floor))),
        "forget_quality": float(test.pvalue),
        "distance": float(test.statistic),
        "utility": metrics.harmonic_mean([metrics.mean(part) for part in parts]),
    }


def chosen(model: Model, params: Params, options: table.Table, count: int):
    """[n] int: which of each question's `count` answers is likeliest.

    Args:
        model, params: who is asked.
        options: [n * count] rows, the answers of one question one after another.
        count: answers of a question.
    Returns:
        The index of the answer with the highest mean log-probability of a token; where
        a model gives NaN the answer is never chosen.
    """
    scores = evaluate.token_scores(model, params, options, batch_size=BATCH)
    nll = metrics.mean_nll(scores.logps, where=scores.where)
    nll = np.nan_to_num(nll, nan=np.inf).reshape(-1, count)
    broken = ~np.isfinite(nll).any(1)
    return np.where(broken, -1, nll.argmin(1))


def in_words(summary: Mapping[str, float]) -> str:
    """A line for people."""
    return (
        f"forget probability {summary['forget_probability']:.3f}, exact "
        f"{summary['forget_exact']:.0%}; retain probability "
        f"{summary['retain_probability']:.3f}, exact {summary['retain_exact']:.0%}; "
        f"forget quality {summary['forget_quality']:.2g}, utility "
        f"{summary['utility']:.3f}"
    )


def _answers(wrong: int) -> Sequence[Any]:
    def bad(i, row):
        return row["perturbed_answer"][i]

    plain = (lambda row: row["answer"], lambda row: row["paraphrased_answer"])
    return (*plain, *(partial(bad, i) for i in range(wrong)))
