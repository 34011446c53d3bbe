# SPDX-License-Identifier: Apache-2.0
"""What a model knows of facts, fact by fact, in three ways.

* completion: greedy decoding says the answer within some tokens;
* choice: the right choice is the likeliest, by the sum over its tokens;
* probability: exp(mean log-probability of a token of the answer).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import evaluate
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.attack.facts import Fact

WAYS = ("completion", "choice", "probability")


class How(NamedTuple):
    """How facts are put to a model.

    Attributes:
        prompt: what stands before the answer; {question} is filled in.
        new_tokens: of a completion.
        batch_size: rows at a time.
    """

    prompt: str = "{question}"
    new_tokens: int = 12
    batch_size: int = 32

    def prompts(self, facts: Sequence[Fact]) -> list[str]:
        """What the model reads of each fact."""
        return [self.prompt.replace("{question}", fact["question"]) for fact in facts]


def ask(
    model: Model,
    params: Params,
    tokenizer: Any,
    facts: Sequence[Fact],
    how: How,
    *,
    change: Callable[[list[str]], list[str]] | None = None,
) -> dict[str, list[float]]:
    """By way, a number for each fact: 0 or 1, or a probability.

    Args:
        model, params, tokenizer: who is asked.
        facts: n of them.
        how: see How.
        change: what an attacker makes of the prompts.
    """
    prompts = how.prompts(facts)
    prompts = change(prompts) if change else prompts
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        prompts,
        max_new_tokens=how.new_tokens,
        batch_size=how.batch_size,
    )
    chosen = evaluate.choose(
        model,
        params,
        tokenizer,
        prompts,
        [fact["choices"] for fact in facts],
        batch_size=how.batch_size,
    )
    rows = table.encode(tokenizer, prompts, [fact["text"] for fact in facts])
    logps, lengths = evaluate.answer_logps(
        model, params, rows, batch_size=how.batch_size
    )
    right = [fact["answer"] for fact in facts]
    says = [said(fact, text) for fact, text in zip(facts, texts, strict=True)]
    return {
        "completion": [int(x) for x in says],
        "choice": (chosen == np.array(right)).astype(int).tolist(),
        "probability": np.exp(logps / lengths).astype(float).tolist(),
    }


def said(fact: Fact, text: str) -> bool:
    """Whether a text says the answer, as whole words; case and marks do not count."""
    answer = _words(fact["text"])
    return bool(answer) and f" {answer} " in f" {_words(text)} "


def means(asked: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each way; NaN where there is no fact, or a value is NaN."""
    return {
        way: float(np.mean(values)) if len(values) else float("nan")
        for way, values in asked.items()
    }


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
