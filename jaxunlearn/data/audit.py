# SPDX-License-Identifier: Apache-2.0
"""Checks of a dataset that warn and never modify rows.

For example:

    data.overlap(forget, retain, by="id")                       # warns with the ids
    forget = data.drop_long(forget, tokenizer, max_length=256)  # warns with the count
"""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import _encode
from jaxunlearn.data._prompt_format import PLAIN, PromptFormat
from jaxunlearn.data.readers._rows import texts

Row = Mapping[str, Any]


def overlap(
    forget: Sequence[Row], retain: Sequence[Row], *, by: str = "id"
) -> list[Any]:
    """Ids that occur in both sets, and would be forgotten and retained at once.

    Args:
        forget, retain: rows with the column `by`.
        by: the column to compare; "question", for example, for rows without ids. Texts
            that differ only in how accents are composed are equal.
    Returns:
        The ids in both sets, each once, in the order of `forget`; empty if there are
        none.
    Raises:
        KeyError: if a row lacks the column.
    Warns:
        UserWarning: with the number of shared ids and the first of them; also for ids
            that occur more than once within a set.
    """
    ids = {
        name: [_comparable(value) for value in _values(name, rows, by)]
        for name, rows in (("forget", forget), ("retain", retain))
    }
    for name, values in ids.items():
        repeated = list(dict.fromkeys(_repeated(values)))
        if repeated:
            warnings.warn(
                f"{len(repeated)} of the values of {by!r} occur more than once in the "
                f"{name} set: {_checks.listed(repeated)}.",
                stacklevel=2,
            )
    retained = set(ids["retain"])
    both = [value for value in dict.fromkeys(ids["forget"]) if value in retained]
    if both:
        warnings.warn(
            f"{len(both)} of the values of {by!r} are in both the forget and the "
            f"retain set: {_checks.listed(both)}. Remove them from one.",
            stacklevel=2,
        )
    return both


def drop_long(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    prompt: str = "prompt",
    answer: str | Sequence[str] | None = "answer",
    prompt_format: PromptFormat = PLAIN,
) -> list[Row]:
    """The rows of at most `max_length` tokens, unchanged and in order.

    Args:
        rows: rows with the text columns `prompt` and `answer`.
        tokenizer: as for data.encode.
        max_length: largest number of tokens of prompt and answer together.
        prompt, answer: names of the columns; answer None for prompts alone. With
            several columns of answers a row stays if it fits with each of them.
        prompt_format: as for data.encode.
    Raises:
        ValueError: if no row is short enough, or a row has no text in a column.
        KeyError: if a row lacks a column.
    Warns:
        UserWarning: with the number of rows removed and the longest of them.
    """
    _checks.positive_int("data.drop_long", max_length=max_length)
    prompts = texts(rows, prompt)
    names = [answer] if answer is None or isinstance(answer, str) else list(answer)
    answers = [None if name is None else texts(rows, name) for name in names]
    each = [_encode.num_tokens(tokenizer, prompts, x, prompt_format) for x in answers]
    lengths = np.max(each, axis=0)
    num_long = int(np.sum(lengths > max_length))
    if not num_long:
        return list(rows)
    longest = int(lengths.argmax())
    message = (
        f"{num_long} of {len(rows)} rows have more than {max_length} tokens (row "
        f"{longest} has {lengths[longest]})"
    )
    if num_long == len(rows):
        raise ValueError(
            f"data.drop_long needs a row that fits, but {message}. Raise max_length."
        )
    warnings.warn(f"{message} and were removed.", stacklevel=2)
    return [row for row, n in zip(rows, lengths, strict=True) if n <= max_length]


def _values(name: str, rows: Sequence[Row], column: str) -> list[Any]:
    for row in rows:
        fix = "Name another column."
        _checks.has_keys(f"The {name} set", "the column", (column,), row, fix)
    return [row[column] for row in rows]


def _comparable(value: Any) -> Any:
    """A text in one composition of its accents; other values as they are."""
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def _repeated(values: Sequence[Any]) -> list[Any]:
    """The values at their second and later occurrences."""
    seen, repeated = set(), []
    for value in values:
        if value in seen:
            repeated.append(value)
        seen.add(value)
    return repeated
