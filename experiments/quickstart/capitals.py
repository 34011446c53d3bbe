# SPDX-License-Identifier: Apache-2.0
"""The capitals task: its facts, its training tables and its scores.

The forget set holds the capitals of Europe. The retain set holds the other capitals,
other facts of the world, and prose. The task uses only facts that the original model
knows: greedy completion is right in at least half of the evaluated statements.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Task:
    """The facts that the model knows, and the tables that unlearning trains on.

    Attributes:
        facts: {"forget": known capitals of Europe, "retain": other known capitals}.
        num_evaluated: how many facts of each set were evaluated to find these.
        completion: {set: {split: completion accuracy}} of the original model.
        pool: every capital; wrong choices are drawn from it.
        tables: {"forget", "retain", "prose"}: what the streams draw from.
        held_out: prose that is never trained on.
    """

    facts: dict[str, list[facts.Fact]]
    num_evaluated: dict[str, int]
    completion: dict[str, dict[str, float]]
    pool: list[facts.Fact]
    tables: dict[str, dict[str, np.ndarray]]
    held_out: dict[str, np.ndarray]


def make_task(model: Model, params: Params, tokenizer: Any) -> Task:
    """Evaluates every capital and builds the task from those that the model knows.

    Raises:
        ValueError: if it knows fewer than 4 capitals of either set.
    """
    pool = facts.capitals()
    hits = {
        split: completion_hits(model, params, tokenizer, pool, statements(split))
        for split in SPLITS
    }
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
        completion={
            name: {
                split: float(rows[known & side].mean()) for split, rows in hits.items()
            }
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
    phrasings: list[str],
) -> np.ndarray:
    """Whether greedy completion begins with the capital: [facts, phrasings] bool."""
    cells = [(fact, phrasing) for fact in chosen for phrasing in phrasings]
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        [fact.prompt(phrasing) for fact, phrasing in cells],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
    )
    hits = [
        facts.is_answer(fact, text)
        for (fact, _), text in zip(cells, texts, strict=True)
    ]
    return np.array(hits).reshape(len(chosen), len(phrasings))


def completion_accuracy(
    model: Model, params: Params, tokenizer: Any, chosen: list[facts.Fact], split: str
) -> float:
    """Accuracy of greedy completion over the statements of one split."""
    hits = completion_hits(model, params, tokenizer, chosen, statements(split))
    return float(hits.mean())


def choice_accuracy(
    model: Model,
    params: Params,
    tokenizer: Any,
    chosen: list[facts.Fact],
    pool: list[facts.Fact],
    split: str,
) -> float:
    """Accuracy of four-way choice over the questions of one split; chance is 0.25."""
    questions = facts.phrasings("question", SPLITS[split])[:NUM_QUESTIONS]
    options = [facts.choices(fact, pool) for fact in chosen for _ in questions]
    prompts = [fact.prompt(question) for fact in chosen for question in questions]
    picks = evaluate.choose(
        model,
        params,
        tokenizer,
        prompts,
        [names for names, _ in options],
        batch_size=BATCH_SIZE,
    )
    return float(np.mean(picks == np.array([index for _, index in options])))


def score(
    model: Model,
    params: Params,
    tokenizer: Any,
    task: Task,
    completion: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Accuracy over the known facts, by completion and by choice, and prose perplexity.

    Args:
        model, params, tokenizer: what is evaluated.
        task: the facts.
        completion: completion accuracies if they are known already, as in
            `task.completion`.
    """
    scores: dict[str, Any] = {}
    for name, chosen in task.facts.items():
        scores[name] = {}
        for split in SPLITS:
            scores[name][f"greedy_{split}"] = (
                completion[name][split]
                if completion
                else completion_accuracy(model, params, tokenizer, chosen, split)
            )
            scores[name][f"choice_{split}"] = choice_accuracy(
                model, params, tokenizer, chosen, task.pool, split
            )
    scores["prose_perplexity"] = evaluate.perplexity(model, params, task.held_out)
    return scores
