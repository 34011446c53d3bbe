# SPDX-License-Identifier: Apache-2.0
"""Facts as tables: texts to train on, and questions to evaluate."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks, evaluate
from jaxunlearn.attacks._folds import Fact
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model

FORMATS = ("letter", "letter_answer", "text", "answer", "statement")
QUESTION_FORMATS = ("letter", "choice")
LETTERS = "ABCDEFGH"


def encode_facts(
    tokenizer: Any,
    facts: Sequence[Fact],
    format: str = "letter_answer",
    *,
    prompt_format: tables.PromptFormat = tables.PLAIN,
    length: int | None = None,
) -> dict[str, np.ndarray]:
    """Encodes facts as a table to train on, in one of the paper's formats.

    | format | text | tokens in the loss |
    | --- | --- | --- |
    | `letter` | question, lettered choices, "Answer:", letter | the letter |
    | `letter_answer` | the same, then letter and choice | letter and choice |
    | `text` | as `letter_answer` | all |
    | `answer` | question and correct choice only | the choice |
    | `statement` | each `statement` of the fact | all |

    Args:
        tokenizer: a fast tokenizer.
        facts: rows, see Fact.
        format: see above.
        prompt_format: how question and answer are joined. Its wording is for the format
            "answer" only, and statements are plain text.
        length: as for table.encode.
    Returns:
        `tokens`, `mask`, `answer`, each [n, L]; n exceeds the number of facts if these
        have several statements.
    Raises:
        KeyError: if a fact lacks a column. ValueError: if its answer is not the index
            of a choice.
    References: https://arxiv.org/abs/2410.08827
    """
    _checks.one_of("encode_facts", FORMATS, format=format)
    if not facts:
        raise ValueError("encode_facts needs at least one fact, got none.")
    _check(facts, ("statement",) if format == "statement" else ())
    if format == "statement":
        statements = [fact["statement"] for fact in facts]
        texts = [
            x
            for each in statements
            for x in ([each] if isinstance(each, str) else each)
        ]
        return tables.encode(tokenizer, texts, length=length)
    if format == "answer":
        prompts = [fact["question"] for fact in facts]
        answers = [fact["choices"][fact["answer"]] for fact in facts]
    else:
        prompt_format = prompt_format.unworded
        prompts = [lettered(fact) for fact in facts]
        answers = [LETTERS[fact["answer"]] for fact in facts]
        if format != "letter":
            answers = [
                f"{letter}. {fact['choices'][fact['answer']]}"
                for letter, fact in zip(answers, facts, strict=True)
            ]
    table = tables.encode(
        tokenizer, prompts, answers, prompt_format=prompt_format, length=length
    )
    return table | ({"answer": table["mask"]} if format == "text" else {})


def encode_questions(
    model: Model,
    tokenizer: Any,
    facts: Sequence[Fact],
    format: str = "letter",
    *,
    prompt_format: tables.PromptFormat = tables.PLAIN,
) -> dict[str, np.ndarray]:
    """Encodes facts as multiple-choice questions, to evaluate a model on them.

    Args:
        model: the model to evaluate; its number of positions limits the length.
        tokenizer: a fast tokenizer.
        facts: rows, see Fact; all with the same number of choices.
        format: "letter", as in the paper: the options are the letters after the
            lettered choices; "choice": the options are the choices after the question,
            for models that were not trained on letters.
        prompt_format: how question and choice are joined; its wording is for the format
            "choice" only.
    Returns:
        The columns of evaluate.encode_choices, and `right`, [n] int32, the index of the
        correct choice.
    Raises:
        ValueError: if the numbers of choices differ, and as `encode_facts`.
    """
    _checks.one_of("encode_questions", QUESTION_FORMATS, format=format)
    if not facts:
        raise ValueError("encode_questions needs at least one fact, got none.")
    _check(facts)
    if format == "letter":
        prompt_format = prompt_format.unworded
        prompts = [lettered(fact) for fact in facts]
        options = [list(LETTERS[: len(fact["choices"])]) for fact in facts]
    else:
        prompts = [fact["question"] for fact in facts]
        options = [list(fact["choices"]) for fact in facts]
    table = evaluate.encode_choices(
        model, tokenizer, prompts, options, prompt_format=prompt_format
    )
    return table | {"right": np.array([fact["answer"] for fact in facts], np.int32)}


def lettered(fact: Fact) -> str:
    """The question, each choice on a line after its letter, and "Answer:"."""
    lines = [
        f"{letter}. {choice}"
        for letter, choice in zip(LETTERS, fact["choices"], strict=False)
    ]
    return "\n".join([fact["question"], *lines, "Answer:"])


def _check(facts: Sequence[Fact], more: Sequence[str] = ()) -> None:
    for index, fact in enumerate(facts):
        columns = ("question", "choices", "answer", *more)
        owner = f"RTT's fact {index}"
        _checks.has_keys(owner, "columns", columns, fact, "Add them to the row.")
        _checks.texts(owner, question=[fact["question"]], choices=fact["choices"])
        size = len(fact["choices"])
        answer = fact["answer"]
        integer = isinstance(answer, int | np.integer) and not isinstance(answer, bool)
        if not integer or not 0 <= answer < size or not 2 <= size <= len(LETTERS):
            raise ValueError(
                f"{owner} ({fact['question']!r}) needs 2 to {len(LETTERS)} choices and "
                f"the index of the correct one as answer, got {size} choices and "
                f"answer={answer!r}."
            )
