# SPDX-License-Identifier: Apache-2.0
"""Texts to tables of tokens. Public as `data.encode` and as `data.table.encode`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data._prompt_format import (
    PLAIN,
    Conversation,
    PromptFormat,
    check_prompts,
    check_rows,
    render,
)

ROUND_TO = 8  # row lengths are multiples of this: fewer shapes, so fewer compilations
PADDING_SIDES = ("right", "left")


def encode(
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    answers: Sequence[str] | None = None,
    *,
    prompt_format: PromptFormat = PLAIN,
    length: int | None = None,
    padding_side: str = "right",
    mark_end: bool = False,
) -> dict[str, np.ndarray]:
    """Tokenises prompts and answers, joined by a format, and marks the answers' tokens.

    Prompt and answer are tokenised together, as the model reads them. The answer is
    located by character offsets, so a token that spans the boundary shifts nothing:
    every token that ends after the prompt belongs to the answer, separator and end
    included.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Special tokens that it puts before a
            text are included, but in a chat only those that the template writes, and
            the begin token never twice; special tokens that it puts after a text are
            dropped.
        prompts: n texts; in a chat also conversations, see `render`.
        answers: n texts without leading space, or None to encode prompts only;
            `answer` then equals `mask`.
        prompt_format: how prompt and answer are joined; the default puts one space
            between them and no end token after the answer.
        length: L, the length of every row in tokens. None takes the longest row,
            rounded up to a multiple of 8.
        padding_side: "right", or "left" for generation.
        mark_end: whether to add the column `end`, [n, L] bool: the tokens of the
            format's end.
    Returns:
        {"tokens": [n, L] int32, "mask": [n, L] bool, "answer": [n, L] bool}.
    Raises:
        TypeError: for one text in place of a list.
        ValueError: if a row is not a text, rows are longer than `length` (the message
            says how many; `data.drop_long` removes them), an answer is empty or has no
            token, or the format cannot be used, see `render`.
    """
    _checks.one_of("data.encode", PADDING_SIDES, padding_side=padding_side)
    check_rows("data.encode", prompts, answers, prompt_format)
    prompts = list(prompts)
    if answers is not None:
        answers = list(answers)
        for row, answer in enumerate(answers):
            if not answer.strip():
                raise ValueError(
                    f"data.encode needs answers of at least one token, but row {row} "
                    f"({prompts[row]!r}) has {answer!r}. Remove the row."
                )
    rendered = render(tokenizer, prompts, answers, prompt_format)
    texts = [row.text for row in rendered]
    encoded, without_tokens = [], []
    for row, parts in enumerate(rendered):
        ids, spans, _ = _tokenise(tokenizer, parts.text, special=not prompt_format.chat)
        first = len(parts.prompt) + len(parts.separator)
        last = first + len(parts.answer)
        answer = [end > len(parts.prompt) for _, end in spans]
        ending = [end > last for _, end in spans]
        encoded.append((ids, answer, ending))
        if answers is None:
            continue
        if not any(end > first and start < last for start, end in spans):
            without_tokens.append(row)
        elif len(ids) == 1:  # no token is before it, so nothing predicts it
            raise ValueError(
                "data.encode needs a token before the last token of each answer, but "
                f"prompt {prompts[row]!r} and answer {answers[row]!r} in row {row} "
                "have one token together. Give the row a prompt, such as the begin "
                "token."
            )
    if without_tokens:
        row = without_tokens[0]
        raise ValueError(
            f"data.encode needs answers of at least one token, but the tokenizer "
            f"returns none for {answers[row]!r} in row {row} ({len(without_tokens)} of "
            f"{len(encoded)} rows). Remove such rows."
        )
    longest = max((len(ids) for ids, *_ in encoded), default=1)
    if length is None:
        length = rounded_length(longest)
    _checks.positive_int("data.encode", length=length)
    if longest > length:
        long = [i for i, (ids, *_) in enumerate(encoded) if len(ids) > length]
        row = long[0]
        raise ValueError(
            f"data.encode needs rows of at most length={length} tokens, but row {row} "
            f"has {len(encoded[row][0])}: {_short(texts[row])} ({len(long)} of "
            f"{len(encoded)} rows are too long). Set length to {longest} or more (the "
            "longest row), shorten the texts, or remove such rows with data.drop_long."
        )

    table = _empty(len(encoded), length, _pad_id(tokenizer))
    if mark_end:
        table["end"] = np.zeros_like(table["mask"])
    for row, (ids, answer, ending) in enumerate(encoded):
        start = 0 if padding_side == "right" else length - len(ids)
        real = slice(start, start + len(ids))
        table["tokens"][row, real] = ids
        table["mask"][row, real] = True
        table["answer"][row, real] = answer if answers is not None else True
        if mark_end:
            table["end"][row, real] = ending
    return table


def begun(
    owner: str,
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    prompt_format: PromptFormat = PLAIN,
) -> list[str | Conversation]:
    """The prompts, each with a token from which a model can continue.

    A prompt without a token becomes the tokenizer's begin token or, if there is none,
    its end token, as transformers and lm-evaluation-harness do.

    Args:
        owner: what needs the prompts; begins the errors.
        tokenizer, prompts, prompt_format: as for `encode`.
    Raises:
        TypeError, ValueError: for one text, values that are not texts, or a prompt
            without a token where the tokenizer has neither begin nor end token.
    """
    check_prompts(owner, prompts, prompt_format)
    if prompt_format.chat:  # a template writes tokens around every message
        return list(prompts)
    begin, found = tokenizer.bos_token or tokenizer.eos_token, []
    for row, prompt in enumerate(prompts):
        text = prompt_format.worded(prompt)
        if not text.strip() and not _tokenise(tokenizer, text)[0]:
            if not begin:
                raise ValueError(
                    f"{owner} needs prompts of at least one token, got {prompt!r} in "
                    f"row {row}, and the tokenizer has no begin or end token to put in "
                    "its place. Remove the row."
                )
            prompt = begin
        found.append(prompt)
    return found


def rounded_length(length: int) -> int:
    """`length` rounded up to a multiple of ROUND_TO, at least ROUND_TO."""
    return max(1, -(-int(length) // ROUND_TO)) * ROUND_TO


def num_tokens(
    tokenizer: Any,
    prompts: Sequence[str | Conversation],
    answers: Sequence[str] | None = None,
    prompt_format: PromptFormat = PLAIN,
) -> np.ndarray:
    """Number of tokens that `encode` makes of each row, [n] int."""
    special = not prompt_format.chat
    return np.asarray(
        [
            len(_tokenise(tokenizer, row.text, special=special)[0])
            for row in render(tokenizer, prompts, answers, prompt_format)
        ],
        int,
    )


def encode_text(tokenizer: Any, text: str, *, length: int) -> dict[str, np.ndarray]:
    """Cuts running text into rows of exactly `length` tokens and drops the rest.

    Special tokens that the tokenizer puts before a text begin every row. They are not
    marked as answer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        text: running text.
        length: L, tokens per row, special tokens included.
    Returns:
        {"tokens": [n, L] int32, "mask": [n, L] bool, "answer": [n, L] bool}.
    Raises:
        ValueError: if the text has fewer tokens than one row.
    """
    _checks.positive_int("data.encode_text", length=length)
    if problem := _checks.not_text(text):
        raise TypeError(f"data.encode_text needs one text, got {problem}. Join texts.")
    ids, _, num_special = _tokenise(tokenizer, text)
    special, ids = ids[:num_special], ids[num_special:]
    per_row = length - num_special
    rows = len(ids) // per_row if per_row > 0 else 0
    if rows == 0:
        raise ValueError(
            f"data.encode_text needs a text of at least one row of length={length} "
            f"tokens, got {len(ids)} tokens. Give more text or a smaller length."
        )
    table = _empty(rows, length, 0)
    table["tokens"][:, :num_special] = special
    table["tokens"][:, num_special:] = np.reshape(ids[: rows * per_row], (rows, -1))
    table["mask"][:] = True
    table["answer"][:, num_special:] = True
    return table


def _tokenise(
    tokenizer: Any, text: str, special: bool = True
) -> tuple[list[int], list[tuple[int, int]], int]:
    """(token ids, characters from and to of each, number of leading special tokens).

    With `special` the tokenizer puts its special tokens before the text, but no begin
    token before a text that already starts with one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "data.encode needs a fast tokenizer, which knows character offsets, got "
            f"{type(tokenizer).__name__}. Load the tokenizer.json of the model."
        )
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # no warning about long rows: check_length refuses them
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    # A chat marker that is written in the text is special too, but it has characters;
    # only tokens without characters were added by the tokenizer.
    added = [
        bool(flag) and start == end
        for flag, (start, end) in zip(
            encoded["special_tokens_mask"], offsets, strict=True
        )
    ]
    stop = len(ids)
    while stop and added[stop - 1]:
        stop -= 1
    num_special = 0
    while num_special < stop and added[num_special]:
        num_special += 1
    first = 0
    if (
        num_special
        and ids[num_special - 1 : num_special + 1] == [_bos_id(tokenizer)] * 2
    ):
        first, num_special = 1, num_special - 1
    return ids[first:stop], offsets[first:stop], num_special


def _bos_id(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "bos_token_id", None)


def _pad_id(tokenizer: Any) -> int:
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def _empty(rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    return {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "mask": np.zeros((rows, length), np.bool_),
        "answer": np.zeros((rows, length), np.bool_),
    }


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
