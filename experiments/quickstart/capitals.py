# SPDX-License-Identifier: Apache-2.0
"""The capitals task: what the model knows, what it must forget, how both are asked.

Forget: capitals of Europe. Retain: the other capitals, other facts of the world, and
prose. Only facts that the model knows before unlearning count, where known means that
greedy completion is right in at least half of the statements, seen and unseen.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxunlearn import evaluate
from jaxunlearn.data import capitals as facts
from jaxunlearn.data import prose, table
from jaxunlearn.typing import Model, Params

STATEMENTS = 4  # statements asked by completion in each split; all train
QUESTIONS = 2  # questions asked by 4-way choice in each split
SPLITS = {"seen": "train", "unseen": "test"}
NEW_TOKENS = 6
BATCH = 64
PROSE_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Task:
    """The facts the model knows, and the tables that unlearning trains on.

    Attributes:
        forget: known capitals of Europe.
        retain: known other capitals.
        asked: how many facts of each kind were asked to find these.
        right: accuracy of completion over the known facts, before anything is changed.
        pool: every capital, for wrong choices.
        tables: {"forget", "retain", "prose"}: what the streams draw from.
        held_out: prose that is never trained on.
    """

    forget: list[facts.Fact]
    retain: list[facts.Fact]
    asked: dict[str, int]
    right: dict[str, dict[str, float]]
    pool: list[facts.Fact]
    tables: dict[str, dict[str, np.ndarray]]
    held_out: dict[str, np.ndarray]


def make(model: Model, params: Params, tokenizer: Any) -> Task:
    """Asks the model every capital and builds the task from those it knows.

    Raises:
        ValueError: if it knows fewer than 4 capitals of either kind.
    """
    pool = facts.capitals()
    right = {
        split: greedy(model, params, tokenizer, pool, statements(split))
        for split in SPLITS
    }
    known = np.concatenate(list(right.values()), axis=1).mean(axis=1) >= 0.5
    europe = np.array([fact.group == "Europe" for fact in pool])
    forget = [fact for fact, yes in zip(pool, known & europe, strict=True) if yes]
    retain = [fact for fact, yes in zip(pool, known & ~europe, strict=True) if yes]
    if min(len(forget), len(retain)) < 4:
        raise ValueError(
            "The capitals task needs a model that knows at least 4 European and 4 "
            f"other capitals, got {len(forget)} and {len(retain)}. Take a model that "
            "was trained on more text."
        )
    train, held_out = prose.prose()
    world = facts.world()
    other = table.encode(
        tokenizer, [c.prompt for c in world], [c.answer for c in world]
    )
    first = statements_table(tokenizer, forget)
    length = first["tokens"].shape[1]
    return Task(
        forget=forget,
        retain=retain,
        asked={"forget": int(europe.sum()), "retain": int((~europe).sum())},
        right={
            kind: {
                split: float(rows[known & side].mean()) for split, rows in right.items()
            }
            for kind, side in (("forget", europe), ("retain", ~europe))
        },
        pool=pool,
        tables={
            "forget": first,
            "retain": table.concat([statements_table(tokenizer, retain), other]),
            "prose": table.encode_text(tokenizer, train, length=length),
        },
        held_out=_first(table.encode_text(tokenizer, held_out, length=64), PROSE_ROWS),
    )


def statements_table(tokenizer: Any, known: list[facts.Fact]) -> dict[str, np.ndarray]:
    """Every fact in every training statement; only the capital's tokens are answer."""
    pairs = [
        (f.prompt(p), f.answer)
        for f in known
        for p in facts.phrasings("statement", "train")
    ]
    prompts, answers = zip(*pairs, strict=True)
    return table.encode(tokenizer, prompts, answers)


def greedy(
    model: Model,
    params: Params,
    tokenizer: Any,
    known: list[facts.Fact],
    phrasings: list[str],
) -> np.ndarray:
    """Whether greedy completion begins with the capital: [facts, phrasings] bool."""
    prompts = [fact.prompt(phrasing) for fact in known for phrasing in phrasings]
    texts = evaluate.completions(
        model, params, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=BATCH
    )
    asked = [fact for fact in known for _ in phrasings]
    right = [
        facts.is_answer(fact, text) for fact, text in zip(asked, texts, strict=True)
    ]
    return np.array(right).reshape(len(known), len(phrasings))


def score(
    model: Model,
    params: Params,
    tokenizer: Any,
    task: Task,
    right: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Accuracy over the known facts, by completion and by choice, and prose perplexity.

    Args:
        model, params, tokenizer: who is asked.
        task: the facts.
        right: accuracies of completion where they are known already, as in
            `task.right`.
    """
    scores: dict[str, Any] = {}
    for kind, known in (("forget", task.forget), ("retain", task.retain)):
        scores[kind] = {
            f"greedy_{split}": completion(model, params, tokenizer, known, split)
            if right is None
            else right[kind][split]
            for split in SPLITS
        } | {
            f"choice_{split}": _choice(
                model, params, tokenizer, known, task.pool, split
            )
            for split in SPLITS
        }
    scores["prose_perplexity"] = evaluate.perplexity(model, params, task.held_out)
    return scores


def completion(
    model: Model, params: Params, tokenizer: Any, known: list[facts.Fact], split: str
) -> float:
    """Accuracy of greedy completion over the statements of one split."""
    return float(greedy(model, params, tokenizer, known, statements(split)).mean())


def statements(split: str) -> list[str]:
    """The statements that are asked; the unseen ones are never trained on."""
    return facts.phrasings("statement", SPLITS[split])[:STATEMENTS]


def _choice(model, params, tokenizer, known, pool, split) -> float:
    questions = facts.phrasings("question", SPLITS[split])[:QUESTIONS]
    drawn = [facts.choices(fact, pool) for fact in known for _ in questions]
    prompts = [fact.prompt(question) for fact in known for question in questions]
    options = [names for names, _ in drawn]
    chosen = evaluate.choose(
        model, params, tokenizer, prompts, options, batch_size=BATCH
    )
    return float(np.mean(chosen == np.array([index for _, index in drawn])))


def _first(rows: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: column[:count] for name, column in rows.items()}
