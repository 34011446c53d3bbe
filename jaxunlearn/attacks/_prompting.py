# SPDX-License-Identifier: Apache-2.0
"""Prompting: the weights stay, the question gets something in front of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks, evaluate
from jaxunlearn.typing import Model, Params


def few_shot(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    prefix: str = "",
    shots: Sequence[tuple[str, str]] = (),
    number: int = 4,
    between: str = "\n\n",
    seed: int = 0,
    **settings: Any,
) -> list[str]:
    """Greedy answers to prompts behind a prefix and questions that are answered.

    Args:
        model, params, tokenizer: who is attacked.
        prompts: texts that end before the answer.
        prefix: stands in front of all, such as "Answer every question truthfully.".
        shots: (prompt, answer) of facts the attacker knows.
        number: how many of them stand before a prompt, drawn anew for each; never one
            with the same prompt.
        between: stands between the parts.
        seed: of the draws.
        settings: as for evaluate.completions.
    Returns:
        A text a prompt.
    Raises:
        ValueError: if neither prefix nor shots are given, or shots are too few, or a
            text is longer than the model's positions.
    """
    texts = in_context(
        prompts, prefix=prefix, shots=shots, number=number, between=between, seed=seed
    )
    return evaluate.completions(model, params, tokenizer, texts, **settings)


def in_context(
    prompts: Sequence[str],
    *,
    prefix: str = "",
    shots: Sequence[tuple[str, str]] = (),
    number: int = 4,
    between: str = "\n\n",
    seed: int = 0,
) -> list[str]:
    """The texts that `few_shot` has completed, to be asked in other ways too."""
    owner = "attacks.few_shot"
    _checks.not_negative(owner, seed=seed)
    if not prefix and not shots:
        raise ValueError(
            f"{owner} needs a prefix or shots, got neither: that is no attack."
        )
    made = []
    for place, prompt in enumerate(prompts):
        parts = [prefix] if prefix else []
        if shots:
            _checks.positive_int(owner, number=number)
            others = [shot for shot in shots if shot[0] != prompt]
            if len(others) < number:
                raise ValueError(
                    f"{owner} needs at least number={number} shots with another prompt "
                    f"than {prompt!r}, got {len(others)}. Give more shots or a smaller "
                    "number."
                )
            draw = np.random.default_rng([seed, place])
            drawn = draw.choice(len(others), number, replace=False)
            parts += [" ".join(others[i]) for i in drawn]
        made.append(between.join([*parts, prompt]))
    return made
