# SPDX-License-Identifier: Apache-2.0
"""How facts are put to a model: what is trained on, and what is asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks, evaluate
from jaxunlearn.attacks._folds import Fact
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model

FORMATS = ("letter", "letter_answer", "text", "answer", "statement")
ASKED = ("letter", "choice")
LETTERS = "ABCDEFGH"


def encode_facts(
    tokenizer: Any,
    facts: Sequence[Fact],
    format: str = "letter_answer",
    *,
    prompt: str = "{question}",
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """Facts as a table to train on, in one of the paper's formats.

    | format | text | the loss reads |
    | --- | --- | --- |
    | `letter` | question, lettered choices, "Answer:", letter | the letter |
    | `letter_answer` | the same with letter and choice | both of them |
    | `text` | as `letter_answer` | every token |
    | `answer` | question and right choice, no others | the choice |
    | `statement` | the fact's `statement`, or each of several | every token |

    Args:
        tokenizer: a fast tokenizer.
        facts: rows, see Fact.
        format: one of the above.
        prompt: of `answer`: what stands before the choice.
        length: as for table.encode.
    Returns:
        `tokens`, `mask`, `answer`, each [n, L]; n is larger than the number of facts
        where these have several statements.
    Raises:
        KeyError: if a fact lacks a column. ValueError: if its answer is no choice.
    References: https://arxiv.org/abs/2410.08827
    """
    _checks.one_of("encode_facts", FORMATS, format=format)
    if not facts:
        raise ValueError("encode_facts needs at least one fact, got none.")
    _check(facts, ("statement",) if format == "statement" else ())
    if format == "statement":
        told = [fact["statement"] for fact in facts]
        texts = [
            x for each in told for x in ([each] if isinstance(each, str) else each)
        ]
        return tables.encode(tokenizer, texts, length=length)
    if format == "answer":
        prompts = [_filled(prompt, fact) for fact in facts]
        answers = [fact["choices"][fact["answer"]] for fact in facts]
    else:
        prompts = [lettered(fact) for fact in facts]
        answers = [LETTERS[fact["answer"]] for fact in facts]
        if format != "letter":
            answers = [
                f"{letter}. {fact['choices'][fact['answer']]}"
                for letter, fact in zip(answers, facts, strict=True)
            ]
    made = tables.encode(tokenizer, prompts, answers, length=length)
    return made | ({"answer": made["mask"]} if format == "text" else {})


def encode_asked(
    model: Model,
    tokenizer: Any,
    facts: Sequence[Fact],
    asked: str = "letter",
    *,
    prompt: str = "{question}",
) -> dict[str, np.ndarray]:
    """Facts as questions of several choices: evaluate.encode_choices and `right` [n].

    Args:
        model: who is asked, for its positions.
        tokenizer: a fast tokenizer.
        facts: rows, see Fact; all with as many choices.
        asked: "letter", the paper's: which letter follows the lettered choices;
            "choice": which choice follows the question, for models that were never
            taught letters.
        prompt: of "choice".
    Raises:
        ValueError: if the numbers of choices differ, and as encode_facts.
    """
    _checks.one_of("encode_asked", ASKED, asked=asked)
    if not facts:
        raise ValueError("encode_asked needs at least one fact, got none.")
    _check(facts)
    if asked == "letter":
        prompts = [lettered(fact) for fact in facts]
        options = [list(LETTERS[: len(fact["choices"])]) for fact in facts]
    else:
        prompts = [_filled(prompt, fact) for fact in facts]
        options = [list(fact["choices"]) for fact in facts]
    table = evaluate.encode_choices(model, tokenizer, prompts, options)
    return table | {"right": np.array([fact["answer"] for fact in facts], np.int32)}


def lettered(fact: Fact) -> str:
    """The question, each choice on a line behind its letter, and "Answer:"."""
    lines = [
        f"{letter}. {choice}"
        for letter, choice in zip(LETTERS, fact["choices"], strict=False)
    ]
    return "\n".join([fact["question"], *lines, "Answer:"])


def _filled(prompt: str, fact: Fact) -> str:
    return prompt.replace("{question}", fact["question"])


def _check(facts: Sequence[Fact], more: Sequence[str] = ()) -> None:
    for number, fact in enumerate(facts):
        columns = ("question", "choices", "answer", *more)
        owner = f"RTT's fact {number}"
        _checks.has_keys(owner, "columns", columns, fact, "Add them to the row.")
        count = len(fact["choices"])
        right = fact["answer"]
        whole = isinstance(right, int | np.integer) and not isinstance(right, bool)
        if not whole or not 0 <= right < count or not 2 <= count <= len(LETTERS):
            raise ValueError(
                f"{owner} ({fact['question']!r}) needs 2 to {len(LETTERS)} choices and "
                f"the number of the right one, got {count} choices and answer="
                f"{right!r}."
            )
