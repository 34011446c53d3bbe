# SPDX-License-Identifier: Apache-2.0
"""Texts into tables of tokens; reached as table.encode and table.encode_text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks

ROUND_TO = 8
PADS = ("right", "left")


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    length: int | None = None,
    pad: str = "right",
    between: str = " ",
) -> dict[str, np.ndarray]:
    """Tokenises prompt + between + answer as one text, and marks the answer's tokens.

    The two are tokenised jointly, as the model would read them, and the answer is found
    by its place among the characters: merges across the boundary cannot shift it. Every
    token that reaches beyond the prompt belongs to the answer, what is between
    included.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Special tokens that it puts in front
            are kept, those that it puts behind are dropped.
        prompts: n texts.
        answers: n texts without leading space, or None for the prompts alone; `answer`
            is `mask` then. No end token is added.
        length: L; None takes the longest row, rounded up to a multiple of 8.
        pad: the side that is padded; "left" for generation.
        between: stands before an answer; "" behind prompts of `chat`.
    Returns:
        {"tokens": [n, L] int32, "mask": [n, L] bool, "answer": [n, L] bool}.
    Raises:
        ValueError: if rows are longer than `length`, saying how many (`data.drop_long`
            leaves them out), or if an answer is empty or has no token.
    """
    _checks.one_of("table.encode", PADS, pad=pad)
    if isinstance(prompts, str) or isinstance(answers, str):
        raise TypeError(
            "table.encode needs sequences of texts, got one text. Put it in a list."
        )
    prompts = list(prompts)
    if answers is None:
        texts, starts = prompts, [0] * len(prompts)
    else:
        answers = list(answers)
        if len(answers) != len(prompts):
            raise ValueError(
                f"table.encode needs one answer a prompt, got {len(prompts)} prompts "
                f"and {len(answers)} answers."
            )
        for row, answer in enumerate(answers):
            if not answer.strip():
                raise ValueError(
                    f"table.encode needs answers of at least one token, but row {row} "
                    f"({prompts[row]!r}) has {answer!r}. Leave the row out."
                )
        texts = [p + between + a for p, a in zip(prompts, answers, strict=True)]
        starts = [len(prompt) for prompt in prompts]

    coded, lost = [], []
    for text, start in zip(texts, starts, strict=True):
        ids, ends, _ = _tokenise(tokenizer, text)
        coded.append((ids, [end > start for end in ends]))
        if answers is not None and not any(end > start + len(between) for end in ends):
            lost.append(len(coded) - 1)  # at most what is between has a token
    if lost:
        raise ValueError(
            f"table.encode needs answers of at least one token, but the tokenizer "
            f"makes nothing of {answers[lost[0]]!r} in row {lost[0]} ({len(lost)} of "
            f"{len(coded)} rows). Leave such rows out."
        )
    longest = max((len(ids) for ids, _ in coded), default=1)
    if length is None:
        length = max(ROUND_TO, -(-longest // ROUND_TO) * ROUND_TO)
    _checks.positive_int("table.encode", length=length)
    if longest > length:
        long = [i for i, (ids, _) in enumerate(coded) if len(ids) > length]
        row = long[0]
        raise ValueError(
            f"table.encode needs rows of at most length={length} tokens, but row {row} "
            f"has {len(coded[row][0])}: {_short(texts[row])} ({len(long)} of "
            f"{len(coded)} rows are too long). Set length to {longest} or more (the "
            "longest row), shorten the texts, or leave such rows out by data.drop_long."
        )

    table = _blank(len(coded), length, _pad_id(tokenizer))
    for row, (ids, answer) in enumerate(coded):
        at = slice(0, len(ids)) if pad == "right" else slice(length - len(ids), length)
        table["tokens"][row, at] = ids
        table["mask"][row, at] = True
        table["answer"][row, at] = answer if answers is not None else True
    return table


def chat(
    tokenizer: Any, questions: Sequence[str], *, system: str = "", **more: Any
) -> list[str]:
    """Prompts in the tokenizer's own chat template, up to where the answer begins.

        prompts = data.chat(tokenizer, ["Who wrote it?"], system="Be brief.")
        answers = ["Nobody." + tokenizer.eos_token]
        data.encode(tokenizer, prompts, answers, between="")

    A begin token that the tokenizer puts in front of every text by itself is left out,
    so that it comes once.

    Args:
        tokenizer: one with a chat template.
        questions: n texts, what the user says.
        system: what the system says before; nothing if empty.
        more: for the template, such as date_string, without which some write today's.
    Returns:
        n texts.
    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "data.chat needs a tokenizer with a chat template, got one without. Take "
            "that of an instruct model, or write the prompts out."
        )
    begin, first = tokenizer.bos_token, list(tokenizer("")["input_ids"])
    twice = bool(begin) and first[:1] == [tokenizer.bos_token_id]
    made = []
    for question in questions:
        said = [{"role": "system", "content": system}] if system else []
        said.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, **more
        )
        made.append(text.removeprefix(begin) if twice else text)
    return made


def lengths(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    between: str = " ",
) -> np.ndarray:
    """[n] int: the tokens that each row would have in `encode`."""
    texts = prompts
    if answers is not None:
        texts = [p + between + a for p, a in zip(prompts, answers, strict=True)]
    return np.asarray([len(_tokenise(tokenizer, text)[0]) for text in texts], int)


def encode_text(tokenizer: Any, text: str, *, length: int) -> dict[str, np.ndarray]:
    """Cuts prose into rows of exactly `length` tokens; what is left over is dropped.

    Special tokens that the tokenizer puts in front of a text begin every row and are no
    answer.

    Returns:
        {"tokens", "mask", "answer"}, each [n, length].
    Raises:
        ValueError: if the text fills no row.
    """
    _checks.positive_int("table.encode_text", length=length)
    ids, _, front = _tokenise(tokenizer, text)
    prefix, ids = ids[:front], ids[front:]
    room = length - front
    count = len(ids) // room if room > 0 else 0
    if count == 0:
        raise ValueError(
            f"table.encode_text needs a text of at least one row of length={length} "
            f"tokens, got {len(ids)} tokens. Give more text or a smaller length."
        )
    table = _blank(count, length, 0)
    table["tokens"][:, :front] = prefix
    table["tokens"][:, front:] = np.asarray(ids[: count * room]).reshape(count, room)
    table["mask"][:] = True
    table["answer"][:, front:] = True
    return table


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[int], int]:
    """Ids, the character where each ends, and how many special tokens lead."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "table needs a fast tokenizer (one that knows character offsets), got "
            f"{type(tokenizer).__name__}. Load the tokenizer.json of the model."
        )
    coded = tokenizer(
        text,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # rows longer than the model are check_length's affair
    )
    ids, ends = coded["input_ids"], [end for _, end in coded["offset_mapping"]]
    # A chat marker that is written out in the text is special too, but has its
    # characters.
    added = [
        bool(special) and start == end
        for special, (start, end) in zip(
            coded["special_tokens_mask"], coded["offset_mapping"], strict=True
        )
    ]
    last = len(ids)
    while last and added[last - 1]:
        last -= 1
    front = 0
    while front < last and added[front]:
        front += 1
    return ids[:last], ends[:last], front


def _pad_id(tokenizer: Any) -> int:
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def _blank(count: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    return {
        "tokens": np.full((count, length), pad_id, np.int32),
        "mask": np.zeros((count, length), np.bool_),
        "answer": np.zeros((count, length), np.bool_),
    }


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
