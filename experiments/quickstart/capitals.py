# SPDX-License-Identifier: Apache-2.0
"""The capitals task: its facts, its training tables and its scores.

The forget set holds the capitals of Europe. The retain set holds the other capitals,
other facts of the world, and prose. The task uses only facts that the original model
knows: greedy completion is right in at least half of the evaluated statements.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxunlearn import evaluate
from jaxunlearn.data import capitals as facts
from jaxunlearn.data import prose, table
from jaxunlearn.typing import Model, Params

NUM_STATEMENTS = 4  # statements that are completed, of each split; all are trained on
NUM_QUESTIONS = 2  # four-way questions, of each split
SPLITS = {"seen": "train", "unseen": "test"}  # wording that training has seen, or not
MAX_NEW_TOKENS = 6
BATCH_SIZE = 64
PROSE_ROWS = 64


Hits = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Task:
    """The facts that the model knows, and the tables that unlearning trains on.

    Attributes:
        facts: {"forget": known capitals of Europe, "retain": other known capitals}.
        num_evaluated: how many facts of each set were evaluated to find these.
        hits: {set: {split: [facts, statements] bool}}, whether the original model
            completes each statement correctly.
        pool: every capital; wrong choices are drawn from it.
        tables: {"forget", "retain", "prose"}: what the streams draw from.
        held_out: prose that is never trained on.
    """

    facts: dict[str, list[facts.Fact]]
    num_evaluated: dict[str, int]
    hits: Hits
    pool: list[facts.Fact]
    tables: dict[str, dict[str, np.ndarray]]
    held_out: dict[str, np.ndarray]


def make_task(model: Model, params: Params, tokenizer: Any) -> Task:
    """Evaluates every capital and builds the task from those that the model knows.

    Raises:
        ValueError: if it knows fewer than 4 capitals of either set.
    """
    pool = facts.capitals()
    hits = completion_hits(model, params, tokenizer, pool)
    known = np.concatenate(list(hits.values()), axis=1).mean(axis=1) >= 0.5
    europe = np.array([fact.group == "Europe" for fact in pool])
    sides = {"forget": europe, "retain": ~europe}
    chosen = {
        name: [fact for fact, keep in zip(pool, known & side, strict=True) if keep]
        for name, side in sides.items()
    }
    if min(map(len, chosen.values())) < 4:
        raise ValueError(
            "The capitals task needs a model that knows at least 4 European and 4 "
            f"other capitals, got {len(chosen['forget'])} and {len(chosen['retain'])}. "
            "Use a model that was trained on more text."
        )
    world = facts.world()
    other = table.encode(
        tokenizer, [fact.prompt for fact in world], [fact.answer for fact in world]
    )
    forget = statements_table(tokenizer, chosen["forget"])
    train_prose, held_out = prose.prose()
    length = forget["tokens"].shape[1]
    held_out = table.encode_text(tokenizer, held_out, length=64)
    return Task(
        facts=chosen,
        num_evaluated={name: int(side.sum()) for name, side in sides.items()},
        hits={
            name: {split: rows[known & side] for split, rows in hits.items()}
            for name, side in sides.items()
        },
        pool=pool,
        tables={
            "forget": forget,
            "retain": table.concat(
                [statements_table(tokenizer, chosen["retain"]), other]
            ),
            "prose": table.encode_text(tokenizer, train_prose, length=length),
        },
        held_out={name: column[:PROSE_ROWS] for name, column in held_out.items()},
    )


def statements(split: str) -> list[str]:
    """The statements that are completed; training never sees the "unseen" ones."""
    return facts.phrasings("statement", SPLITS[split])[:NUM_STATEMENTS]


def statements_table(tokenizer: Any, chosen: list[facts.Fact]) -> dict[str, np.ndarray]:
    """Every fact in every training statement; only the capital's tokens are answer."""
    pairs = [
        (fact.prompt(phrasing), fact.answer)
        for fact in chosen
        for phrasing in facts.phrasings("statement", "train")
    ]
    prompts, answers = zip(*pairs, strict=True)
    return table.encode(tokenizer, prompts, answers)


def completion_hits(
    model: Model,
    params: Params,
    tokenizer: Any,
    chosen: list[facts.Fact],
    splits: Iterable[str] = tuple(SPLITS),
) -> dict[str, np.ndarray]:
    """Whether greedy completion begins with the capital: {split: [facts, statements]
    bool}. All statements are generated together."""
    phrasings = [(split, each) for split in splits for each in statements(split)]
    cells = [(fact, phrasing) for fact in chosen for _, phrasing in phrasings]
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        [fact.prompt(phrasing) for fact, phrasing in cells],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
    )
    hits = np.array(
        [
            facts.is_answer(fact, text)
            for (fact, _), text in zip(cells, texts, strict=True)
        ]
    ).reshape(len(chosen), len(phrasings))
    of_column = np.array([split for split, _ in phrasings])
    return {split: hits[:, of_column == split] for split in splits}


def task_hits(model: Model, params: Params, tokenizer: Any, task: Task) -> Hits:
    """`completion_hits` of the task's facts, {set: {split: [facts, statements]}}."""
    names = list(task.facts)
    chosen = [fact for name in names for fact in task.facts[name]]
    hits = completion_hits(model, params, tokenizer, chosen)
    cut = np.cumsum([len(task.facts[name]) for name in names])[:-1]
    found: Hits = {name: {} for name in names}
    for split, rows in hits.items():
        for name, part in zip(names, np.split(rows, cut), strict=True):
            found[name][split] = part
    return found


def choice_accuracy(
    model: Model, params: Params, tokenizer: Any, task: Task
) -> dict[str, dict[str, float]]:
    """{set: {split: accuracy of four-way choice over its questions}}; chance is 0.25.

    All questions are scored together.
    """
    cells = [
        (name, split, fact, question)
        for name, chosen in task.facts.items()
        for split, wording in SPLITS.items()
        for fact in chosen
        for question in facts.phrasings("question", wording)[:NUM_QUESTIONS]
    ]
    options = [facts.choices(fact, task.pool) for _, _, fact, _ in cells]
    picks = evaluate.choose(
        model,
        params,
        tokenizer,
        [fact.prompt(question) for _, _, fact, question in cells],
        [names for names, _ in options],
        batch_size=BATCH_SIZE,
    )
    right = picks == np.array([index for _, index in options])
    where = np.array([(name, split) for name, split, _, _ in cells])
    return {
        name: {
            split: float(right[(where == (name, split)).all(1)].mean())
            for split in SPLITS
        }
        for name in task.facts
    }


def score(
    model: Model, params: Params, tokenizer: Any, task: Task, hits: Hits
) -> dict[str, Any]:
    """Accuracy over the known facts, by completion and by choice, and prose perplexity.

    Args:
        model, params, tokenizer: what is evaluated.
        task: the facts.
        hits: `task_hits` of these params.
    """
    choices = choice_accuracy(model, params, tokenizer, task)
    scores: dict[str, Any] = {
        name: {
            f"{kind}_{split}": value
            for split in SPLITS
            for kind, value in (
                ("greedy", float(hits[name][split].mean())),
                ("choice", choices[name][split]),
            )
        }
        for name in task.facts
    }
    scores["prose_perplexity"] = evaluate.perplexity(
        model, params, task.held_out, batch_size=PROSE_ROWS // 4
    )
    return scores
