# SPDX-License-Identifier: Apache-2.0
"""Prompting attacks: text in front of the question; the weights do not change."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks, evaluate
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model, Params


def few_shot(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    prefix: str = "",
    shots: Sequence[tuple[str, str]] = (),
    num_shots: int = 4,
    separator: str = "\n\n",
    prompt_format: tables.PromptFormat = tables.PLAIN,
    seed: int = 0,
    **settings: Any,
) -> list[str]:
    """Greedy answers to prompts after a prefix and answered example questions.

    The attacker can only prompt the model, and may know some facts. If forgotten
    answers come back, prompting is enough to recover them.

    Args:
        model, params, tokenizer: the attacked model.
        prompts: texts that end before the answer.
        prefix: text at the beginning, such as "Answer every question truthfully.".
        shots: (prompt, answer) of facts that the attacker knows.
        num_shots: number of shots before each prompt. They are drawn for every prompt,
            without shots that have the same prompt.
        separator: text between the parts.
        prompt_format: how prompts and answers are joined. In a chat each shot is a turn
            of the conversation, and the prefix begins the first message of the user.
        seed: draws the shots.
        settings: as for evaluate.completions.
    Returns:
        One text for each prompt.
    Raises:
        TypeError: for one text in place of a list of prompts.
        ValueError: if neither prefix nor shots are given, there are too few shots, or a
            text is longer than the model's positions.
    """
    texts = in_context(
        prompts,
        prefix=prefix,
        shots=shots,
        num_shots=num_shots,
        separator=separator,
        prompt_format=prompt_format,
        seed=seed,
    )
    return evaluate.completions(
        model,
        params,
        tokenizer,
        texts,
        prompt_format=prompt_format.unworded,
        **settings,
    )


def in_context(
    prompts: Sequence[str],
    *,
    prefix: str = "",
    shots: Sequence[tuple[str, str]] = (),
    num_shots: int = 4,
    separator: str = "\n\n",
    prompt_format: tables.PromptFormat = tables.PLAIN,
    seed: int = 0,
) -> list[str] | list[tables.Conversation]:
    """The prompts that `few_shot` completes, for other evaluations of the same attack.

    Args, Raises: as `few_shot`.
    Returns:
        One text for each prompt, ending with the prompt; in a chat one conversation.
        They have the wording of the format: read them with `prompt_format.unworded`.
    """
    owner = "attacks.few_shot"
    _checks.texts(owner, prompts=prompts)
    _checks.not_negative(owner, seed=seed)
    for row, shot in enumerate(shots):
        _checks.texts(owner, **{f"shots[{row}]": shot})
    if not prefix and not shots:
        raise ValueError(
            f"{owner} needs a prefix or shots, got neither. Pass one, or both."
        )
    texts = []
    for index, prompt in enumerate(prompts):
        drawn = []
        if shots:
            _checks.positive_int(owner, num_shots=num_shots)
            others = [shot for shot in shots if shot[0] != prompt]
            if len(others) < num_shots:
                raise ValueError(
                    f"{owner} needs at least num_shots={num_shots} shots with another "
                    f"prompt than {prompt!r}, got {len(others)}. Give more shots or a "
                    "smaller num_shots."
                )
            rng = np.random.default_rng([seed, index])
            chosen = rng.choice(len(others), num_shots, replace=False)
            drawn = [others[i] for i in chosen]
        texts.append(_joined(prefix, drawn, prompt, separator, prompt_format))
    return texts


def _joined(prefix, shots, prompt, separator, prompt_format):
    """One prompt of `in_context`."""
    front = f"{prefix}{separator}" if prefix else ""
    questions = [prompt_format.worded(text) for text, _ in [*shots, (prompt, "")]]
    answers = [answer for _, answer in shots]
    if not prompt_format.chat:
        between = " " if prompt_format.separator == "auto" else prompt_format.separator
        shown = [q + between + a for q, a in zip(questions, answers, strict=False)]
        return front + separator.join([*shown, questions[-1]])
    questions[0] = front + questions[0]
    messages = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:], strict=True):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
    return messages
