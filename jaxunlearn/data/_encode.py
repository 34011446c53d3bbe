# SPDX-License-Identifier: Apache-2.0
"""Texts to tables of tokens. Public as `data.encode` and as `data.table.encode`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks

ROUND_TO = 8  # row lengths are multiples of this: fewer shapes, so fewer compilations
PADDING_SIDES = ("right", "left")


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    length: int | None = None,
    padding_side: str = "right",
    separator: str = " ",
) -> dict[str, np.ndarray]:
    """Tokenises prompt + separator + answer and marks the tokens of the answer.

    Prompt and answer are tokenised together, as the model reads them. The answer is
    located by character offsets, so a token that spans the boundary shifts nothing:
    every token that ends after the prompt belongs to the answer, the separator
    included.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Special tokens that it puts before a
            text are included; special tokens that it puts after a text are dropped.
        prompts: n texts.
        answers: n texts without leading space, or None to encode prompts only;
            `answer` then equals `mask`. No end token is added.
        length: L, the length of every row in tokens. None takes the longest row,
            rounded up to a multiple of 8.
        padding_side: "right", or "left" for generation.
        separator: text between prompt and answer; "" after `chat_prompts`.
    Returns:
        {"tokens": [n, L] int32, "mask": [n, L] bool, "answer": [n, L] bool}.
    Raises:
        TypeError: for one text in place of a list.
        ValueError: if a row is not a text, rows are longer than `length` (the message
            says how many; `data.drop_long` removes them), or an answer is empty or has
            no token.
    """
    _checks.one_of("data.encode", PADDING_SIDES, padding_side=padding_side)
    _checks.texts("data.encode", prompts=prompts, answers=answers)
    prompts = list(prompts)
    if answers is None:
        texts, starts = prompts, [0] * len(prompts)
    else:
        answers = list(answers)
        if len(answers) != len(prompts):
            raise ValueError(
                f"data.encode needs one answer per prompt, got {len(prompts)} prompts "
                f"and {len(answers)} answers."
            )
        for row, answer in enumerate(answers):
            if not answer.strip():
                raise ValueError(
                    f"data.encode needs answers of at least one token, but row {row} "
                    f"({prompts[row]!r}) has {answer!r}. Remove the row."
                )
        texts = [p + separator + a for p, a in zip(prompts, answers, strict=True)]
        starts = [len(prompt) for prompt in prompts]

    encoded, without_tokens = [], []
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        ids, ends, _ = _tokenise(tokenizer, text)
        encoded.append((ids, [end > start for end in ends]))
        if answers is None:
            continue
        if not any(end > start + len(separator) for end in ends):
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
    longest = max((len(ids) for ids, _ in encoded), default=1)
    if length is None:
        length = rounded_length(longest)
    _checks.positive_int("data.encode", length=length)
    if longest > length:
        long = [i for i, (ids, _) in enumerate(encoded) if len(ids) > length]
        row = long[0]
        raise ValueError(
            f"data.encode needs rows of at most length={length} tokens, but row {row} "
            f"has {len(encoded[row][0])}: {_short(texts[row])} ({len(long)} of "
            f"{len(encoded)} rows are too long). Set length to {longest} or more (the "
            "longest row), shorten the texts, or remove such rows with data.drop_long."
        )

    table = _empty(len(encoded), length, _pad_id(tokenizer))
    for row, (ids, answer) in enumerate(encoded):
        start = 0 if padding_side == "right" else length - len(ids)
        real = slice(start, start + len(ids))
        table["tokens"][row, real] = ids
        table["mask"][row, real] = True
        table["answer"][row, real] = answer if answers is not None else True
    return table


def begun(owner: str, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts, each with a token from which a model can continue.

    A prompt without a token becomes the tokenizer's begin token or, if there is none,
    its end token, as transformers and lm-evaluation-harness do.

    Args:
        owner: what needs the prompts; begins the errors.
        tokenizer: as for `encode`.
        prompts: n texts.
    Raises:
        TypeError, ValueError: for one text, values that are not texts, or a prompt
            without a token where the tokenizer has neither begin nor end token.
    """
    _checks.texts(owner, prompts=prompts)
    begin, found = tokenizer.bos_token or tokenizer.eos_token, []
    for row, prompt in enumerate(prompts):
        if not prompt.strip() and not _tokenise(tokenizer, prompt)[0]:
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


def chat_prompts(
    tokenizer: Any,
    questions: Sequence[str],
    *,
    system: str = "",
    **template_arguments: Any,
) -> list[str]:
    """Questions in the tokenizer's chat template, up to where the reply begins.

        prompts = data.chat_prompts(tokenizer, ["Who wrote it?"], system="Be brief.")
        answers = ["Nobody." + tokenizer.eos_token]
        data.encode(tokenizer, prompts, answers, separator="")

    If the tokenizer itself puts a begin token before every text, the template's begin
    token is removed, so that `encode` produces exactly one.

    Args:
        tokenizer: a tokenizer with a chat template.
        questions: n texts, the user's messages.
        system: the system message; none if empty.
        template_arguments: passed to the template. Some templates insert today's date
            unless `date_string` is given.
    Returns:
        n texts.
    Raises:
        TypeError: for one text in place of a list.
        ValueError: if the tokenizer has no chat template, or a question is not a text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "data.chat_prompts needs a tokenizer with a chat template, got "
            "chat_template=None. Use the tokenizer of an instruct model, or write the "
            "prompts yourself."
        )
    _checks.texts("data.chat_prompts", questions=questions, system=[system])
    bos, empty = tokenizer.bos_token, list(tokenizer("")["input_ids"])
    adds_bos = bool(bos) and empty[:1] == [tokenizer.bos_token_id]
    prompts = []
    for question in questions:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_arguments
        )
        prompts.append(text.removeprefix(bos) if adds_bos else text)
    return prompts


def num_tokens(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    separator: str = " ",
) -> np.ndarray:
    """Number of tokens that `encode` makes of each row, [n] int."""
    texts = prompts
    if answers is not None:
        texts = [p + separator + a for p, a in zip(prompts, answers, strict=True)]
    return np.asarray([len(_tokenise(tokenizer, text)[0]) for text in texts], int)


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


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[int], int]:
    """(token ids, character where each ends, number of leading special tokens)."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "data.encode needs a fast tokenizer, which knows character offsets, got "
            f"{type(tokenizer).__name__}. Load the tokenizer.json of the model."
        )
    encoded = tokenizer(
        text,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # no warning about long rows: check_length refuses them
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    # A chat marker that is written in the text is special too, but it has characters;
    # only tokens without characters were added by the tokenizer.
    added = [
        bool(special) and start == end
        for special, (start, end) in zip(
            encoded["special_tokens_mask"], offsets, strict=True
        )
    ]
    stop = len(ids)
    while stop and added[stop - 1]:
        stop -= 1
    num_special = 0
    while num_special < stop and added[num_special]:
        num_special += 1
    return ids[:stop], [end for _, end in offsets[:stop]], num_special


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
