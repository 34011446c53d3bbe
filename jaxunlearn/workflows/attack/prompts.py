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
        prompt: the text before the answer; {question} is replaced by the question.
        new_tokens: number of generated tokens of a completion.
        batch_size: number of rows in a batch.
    """

    prompt: str = "{question}"
    new_tokens: int = 12
    batch_size: int = 32

    def prompts(self, facts: Sequence[Fact]) -> list[str]:
        """The prompt of each fact."""
        return [self.prompt.replace("{question}", fact["question"]) for fact in facts]


def query(
    model: Model,
    params: Params,
    tokenizer: Any,
    facts: Sequence[Fact],
    settings: PromptSettings,
    *,
    change: Callable[[list[str]], list[str]] | None = None,
) -> dict[str, list[float]]:
    """Measure -> its value for each fact.

    Args:
        model, params, tokenizer: the model.
        facts: n facts.
        settings: how the model is prompted.
        change: the attacker's change to the prompts.
    """
    prompts = settings.prompts(facts)
    prompts = change(prompts) if change else prompts
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        prompts,
        max_new_tokens=settings.new_tokens,
        batch_size=settings.batch_size,
    )
    chosen = evaluate.choose(
        model,
        params,
        tokenizer,
        prompts,
        [fact["choices"] for fact in facts],
        batch_size=settings.batch_size,
    )
    rows = table.encode(tokenizer, prompts, [fact["text"] for fact in facts])
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
