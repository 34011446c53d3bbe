# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set though every row can be read: told, never mended.

data.overlap(forget, retain, by="id")         # warns with the ids
forget = data.drop_long(forget, tokenizer, length=256)      # warns with the count
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import _encode

Row = Mapping[str, Any]


def overlap(
    forget: Sequence[Row], retain: Sequence[Row], *, by: str = "id"
) -> list[Any]:
    """Ids that are in both sets: what would be unlearned and kept at once.

    Args:
        forget, retain: rows with the column `by`.
        by: the column, "question" for rows without ids.
    Returns:
        The ids in both, in the order of forget, each once; empty if all is well.
    Raises:
        KeyError: if a row lacks the column.
    Warns:
        UserWarning: with their number and the first of them, also of those that come
            twice within a set.
    """
    kept = _values("retain", retain, by)
    lost = _values("forget", forget, by)
    for name, values in (("forget", lost), ("retain", kept)):
        twice = list(dict.fromkeys(_repeated(values)))
        if twice:
            warnings.warn(
                f"{len(twice)} of the values of {by!r} come more than once in the "
                f"{name} set: {_checks.listed(twice)}.",
                stacklevel=2,
            )
    also = set(kept)
    both = [value for value in dict.fromkeys(lost) if value in also]
    if both:
        warnings.warn(
            f"{len(both)} of the values of {by!r} are in both the forget and the "
            f"retain set: {_checks.listed(both)}. Take them out of one.",
            stacklevel=2,
        )
    return both


def drop_long(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    length: int,
    prompt: str = "prompt",
    answer: str | None = "answer",
    between: str = " ",
) -> list[Row]:
    """The rows that fit into `length` tokens, whole and in order; none is cut.

    Args:
        rows: with the columns `prompt` and `answer`, texts.
        tokenizer: as for data.encode.
        length: the most tokens of prompt and answer together.
        prompt, answer: names of the columns; answer None for prompts alone.
        between: as for data.encode.
    Raises:
        ValueError: if no row fits.
        KeyError: if a row lacks a column.
    Warns:
        UserWarning: with the number of rows left out and the longest of them.
    """
    _checks.positive_int("drop_long", length=length)
    prompts = _values("given", rows, prompt)
    answers = None if answer is None else _values("given", rows, answer)
    tokens = _encode.lengths(tokenizer, prompts, answers, between)
    long = np.flatnonzero(tokens > length)
    if not long.size:
        return list(rows)
    longest = int(tokens.argmax())
    told = (
        f"{long.size} of {len(rows)} rows have more than {length} tokens (row "
        f"{longest} has {tokens[longest]})"
    )
    if long.size == len(rows):
        raise ValueError(f"drop_long needs a row that fits, but {told}. Raise length.")
    warnings.warn(f"{told} and are left out.", stacklevel=2)
    return [row for row, count in zip(rows, tokens, strict=True) if count <= length]


def _values(name: str, rows: Sequence[Row], column: str) -> list[Any]:
    for row in rows:
        fix = "Name another column."
        _checks.has_keys(f"The {name} set", "the column", (column,), row, fix)
    return [row[column] for row in rows]


def _repeated(values: Sequence[Any]) -> list[Any]:
    seen, twice = set(), []
    for value in values:
        if value in seen:
            twice.append(value)
        seen.add(value)
    return twice
