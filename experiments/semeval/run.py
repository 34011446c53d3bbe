# SPDX-License-Identifier: Apache-2.0
"""SemEval-2025 Task 4 in the small world: memorise LUME, unlearn, the official score.

    python -m experiments.semeval.run

A small decoder memorises a few documents of every task of LUME, and a question of each
subject of MMLU. Each method then forgets the documents of the forget file. The official
scorer measures regurgitation by ROUGE-L recall of greedy completions, knowledge by
exact match, and takes the harmonic mean of the twelve terms; a membership attack by the
area under the ROC curve of the loss on complete documents, forgotten ones against
others never seen; and MMLU. All three parts are always shown.

A decoder of this size knows nothing of MMLU, so its questions are memorised too and are
in no stream of any method: their accuracy shows what else a method destroys, from 1
down to 1/4 by chance. The floor is three quarters of the score before unlearning, as in
the task. The completions' inputs are their last words (see config.py).

Methods are those of the family that changes all weights (2503.04795 and the task's
baselines), and BLUR. Each runs at every rate on the first seed, then on all seeds at
the rate of the best final score above the floor, or of the best MMLU if none is above
it. `original`, `retrained` (never saw the forget file) and `collapsed` (all logits
equal) are scored too.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from experiments.semeval import figures
from experiments.shared import ledger
from experiments.small import program, questions, score, unlearn, world
from jaxunlearn import combine, evaluate, losses, metrics, recipes, terms, trees
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

CONFIG = "experiments/semeval/config.py"
FLOOR = 0.75  # of MMLU before unlearning
OU, BLUR = recipes.openunlearning, recipes.blur
Build = Callable[..., recipes.Recipe]


class SemEvalConfig(NamedTuple):
    """Settings of the experiment.

    Attributes:
        rates: learning rates, all of them on the first seed.
        seeds: of the order of rows.
        steps: of a run.
        batch_size: rows of each stream at a step.
        max_new_tokens: of a completion.
    """

    rates: Sequence[float] = (5e-4, 2e-3)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 30
    batch_size: int = 8
    max_new_tokens: int = 64


def in_turns(model: Model, *, learning_rate: Any, forget: int = 1, retain: int = 1):
    """`forget` steps of ascent, then `retain` steps on the rows to retain, repeatedly;
    one optimizer for both."""

    def forgets(step):
        return step % (forget + retain) < forget

    return _switched(model, learning_rate, forgets)


def in_sequence(model: Model, *, learning_rate: Any, first: int):
    """`first` steps of ascent, then steps on the rows to retain alone."""
    return _switched(model, learning_rate, lambda step: step < first)


def _switched(model, learning_rate, forgets):
    weights = {
        "forget": lambda step: jnp.where(forgets(step), 1.0, 0.0),
        "retain": lambda step: jnp.where(forgets(step), 0.0, 1.0),
    }
    parts = {
        name: terms.on_logps(loss, model, name, reduce="token")
        for name, loss in (("forget", losses.ascent), ("retain", losses.nll))
    }
    clip = optax.clip_by_global_norm(1.0)
    adamw = optax.adamw(learning_rate, weight_decay=0.0)
    return recipes.Recipe(
        parts, optax.chain(combine.weighted_sum(weights), clip, adamw)
    )


def recipes_by_name(steps: int) -> Mapping[str, Build]:
    """Name -> recipe of (model, learning_rate=), for runs of so many steps."""
    return {
        "gradient ascent": OU.ascent,
        "gradient difference": OU.graddiff,
        "KL minimisation": partial(OU.graddiff, retain_loss="kl"),
        "NPO + NLL": OU.npo,
        "in turns, 1 and 1": in_turns,
        "in sequence, a third ascent": partial(in_sequence, first=steps // 3),
        "BLUR-NPO": BLUR.npo,
        "BLUR-GradDiff": BLUR.graddiff,
    }


class Scorer(NamedTuple):
    """What every model is scored on.

    Attributes:
        small: the world.
        documents: kind -> complete documents, every token counted.
        mmlu: four answers of each question, one after another.
        right: [questions] which of the four is right.
        max_new_tokens: of a completion.
        floor: MMLU below which a model is not ranked.
    """

    small: world.World
    documents: Mapping[str, table.Table]
    mmlu: table.Table
    right: np.ndarray
    max_new_tokens: int
    floor: float


def scorer(small: world.World, max_new_tokens: int) -> Scorer:
    """The scorer of a world; the floor comes from its model before unlearning.

    Raises:
        ValueError: if the world is not of LUME.
    """
    source = small.about["config"]["facts"]["source"]
    if source != "lume":
        raise ValueError(
            f"experiments.semeval needs a world of LUME, got {source!r}. Use "
            f"--config={CONFIG}."
        )
    encode = partial(questions.encode, small.tokenizer, length=small.about["length"])
    documents = {}
    for kind in ("forget", "holdout"):
        rows = [row for row in small.questions[kind] if row["kind"] == "sc"]
        documents[kind] = questions.count_documents(rows, encode(rows))
    repeated, answers, right = [], [], []
    for index, row in enumerate(small.questions["other"]):
        options = list(row["perturbed_answer"])
        right.append(index % 4)
        options.insert(index % 4, row["answer"])
        repeated += [row] * 4
        answers += options
    mmlu = encode(repeated, answers)
    made = Scorer(small, documents, mmlu, np.array(right), max_new_tokens, 0.0)
    return made._replace(floor=FLOOR * _mmlu(made, small.params))


def official_score(made: Scorer, params: Params) -> metrics.SemEval:
    """All parts of the official score."""
    small, values, rows = made.small, [], []
    for split in ("forget", "retain"):
        each = small.questions[split]
        texts = evaluate.completions(
            small.model,
            params,
            small.tokenizer,
            [row["question"] for row in each],
            max_new_tokens=made.max_new_tokens,
        )
        texts, answers = [x.strip() for x in texts], [row["answer"] for row in each]
        found = metrics.rouge(texts, answers, rouge_types="rougeL", tokenizer="ascii")
        recall = found["rougeL_recall"]
        exact = metrics.exact_match(texts, answers)
        kinds = np.array([row["kind"] for row in each])
        values.append(np.where(kinds == "sc", recall, exact))
        rows += [(split, row["task"], row["kind"]) for row in each]
    found = metrics.semeval_terms(np.concatenate(values), *zip(*rows, strict=True))
    seen, unseen = (
        _loss(small.model, params, made.documents[kind])
        for kind in ("forget", "holdout")
    )
    auc = metrics.auc(seen, unseen)
    return metrics.semeval(found, auc, _mmlu(made, params), floor=made.floor)


def _loss(model, params, rows) -> np.ndarray:
    """Mean loss of a token of each document, in nats, to five digits, so that float
    rounding does not rank equal ones; NaN counts as the largest."""
    scores = evaluate.token_scores(model, params, rows, batch_size=score.BATCH)
    nll = np.asarray(metrics.mean_nll(scores.logps, where=scores.where), np.float64)
    return np.nan_to_num(nll.round(5), nan=1e9, posinf=1e9)


def _mmlu(made: Scorer, params: Params) -> float:
    chosen = score.chosen_options(made.small.model, params, made.mmlu, 4)
    return float((chosen == made.right).mean())


def collapsed(params: Params) -> Params:
    """Params whose logits are all 0, so that all tokens have the same probability."""
    return trees.map_with_path(
        lambda path, x: jnp.zeros_like(x) if path == "final_norm/scale" else x, params
    )


def run(small: world.World, book: ledger.Ledger, config: SemEvalConfig) -> None:
    """Adds all runs that the ledger lacks.

    Raises:
        ValueError: if the world is not of LUME.
    """
    made = scorer(small, config.max_new_tokens)
    for name, params in (
        ("original", small.params),
        ("retrained", small.retrained),
        ("collapsed", collapsed(small.params)),
    ):
        if book.lacks(name):
            book.add({"key": name, "method": name, **as_json(made, params)})
    streams = functools.cache(lambda: unlearn.forget_and_retain(small))
    unlearn.sweep(
        book,
        recipes_by_name(config.steps),
        config,
        start=lambda name: (small, streams()),
        measure=partial(as_json, made),
        score=rank,
    )


def rank(line: ledger.Line) -> tuple[bool, float]:
    """Orders runs: above the floor by the final score, below it by MMLU."""
    above = not line["below_floor"]
    return above, line["final" if above else "mmlu"]


def as_json(made: Scorer, params: Params) -> dict[str, Any]:
    """The official score for JSON: the twelve terms by "split task kind"."""
    found = official_score(made, params)
    by_name = {" ".join(key): x for key, x in found.terms.items()}
    return found._asdict() | {"terms": by_name}


def about_world(small: world.World) -> dict[str, Any]:
    """How many questions there are, and where they come from."""
    counts = {kind: len(rows) for kind, rows in small.questions.items()}
    return {"questions": counts, "facts": small.about["config"]["facts"]}


if __name__ == "__main__":
    program.main(
        run,
        figures.write,
        __doc__,
        module="experiments.semeval.run",
        settings=SemEvalConfig(),
        config=CONFIG,
        about=about_world,
    )
