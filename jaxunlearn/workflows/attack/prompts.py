# SPDX-License-Identifier: Apache-2.0
"""What a model knows of each fact, by three measures.

* completion: 1 if the greedy completion contains the answer, else 0;
* choice: 1 if the right choice has the highest log-probability (summed over its
  tokens), else 0;
* probability: exp(mean log-probability of a token of the answer).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _text, evaluate
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.attack.facts import Fact

MEASURES = ("completion", "choice", "probability")


class PromptSettings(NamedTuple):
    """How a model is prompted.

    Attributes:
        prompt_format: how questions and answers are joined.
        new_tokens: number of generated tokens of a completion.
        batch_size: number of rows in a batch.
    """

    prompt_format: table.PromptFormat = table.PLAIN
    new_tokens: int = 12
    batch_size: int = 32

    def as_dict(self) -> dict[str, Any]:
        """The settings as files record them."""
        return self._asdict() | {"prompt_format": self.prompt_format.as_dict()}


def questions(facts: Sequence[Fact]) -> list[str]:
    """The question of each fact."""
    return [fact["question"] for fact in facts]


def query(
    model: Model,
    params: Params,
    tokenizer: Any,
    facts: Sequence[Fact],
    settings: PromptSettings,
    *,
    change: Callable[..., list[Any]] | None = None,
) -> dict[str, list[float]]:
    """Measure -> its value for each fact.

    Args:
        model, params, tokenizer: the model.
        facts: n facts.
        settings: how the model is prompted.
        change: the attacker's change to the prompts, from questions and the keyword
            `prompt_format` to prompts that have the wording, as attacks.in_context.
    """
    prompts, prompt_format = questions(facts), settings.prompt_format
    if change:
        prompts = change(prompts, prompt_format=prompt_format)
        prompt_format = prompt_format.unworded
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        prompts,
        prompt_format=prompt_format,
        max_new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
    )
    chosen = evaluate.choose(
        model,
        params,
        tokenizer,
        prompts,
        [fact["choices"] for fact in facts],
        prompt_format=prompt_format,
        batch_size=settings.batch_size,
    )
    answers = [fact["text"] for fact in facts]
    rows = table.encode(tokenizer, prompts, answers, prompt_format=prompt_format)
    logps, lengths = evaluate.answer_logps(
        model, params, rows, batch_size=settings.batch_size
    )
    right = np.array([fact["answer"] for fact in facts])
    return {
        "completion": [
            int(contains_answer(text, fact))
            for text, fact in zip(texts, facts, strict=True)
        ],
        "choice": (chosen == right).astype(int).tolist(),
        "probability": np.exp(logps / lengths).astype(float).tolist(),
    }


def contains_answer(text: str, fact: Fact) -> bool:
    """Whether the answer's words are in the text, ignoring case and punctuation.

    In scripts without spaces between words these are the answer's characters.
    """
    return _text.contains(text, fact["text"])


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each measure; NaN if there is no fact or a value is NaN."""
    return {
        measure: float(np.mean(each)) if len(each) else float("nan")
        for measure, each in values.items()
    }
