# SPDX-License-Identifier: Apache-2.0
"""Sources that decode and encode each row only when it is read.

    lines = data.open_jsonl("retain.jsonl", ("prompt", "answer"))
    retain = data.encoded(lines, tokenizer, length=256)

Anything with a length and rows by index is a source: the file above, a list of dicts,
grain's ArrayRecordDataSource (use `mapped` with json.loads), a Hugging Face dataset.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import table


class BadRow(ValueError):
    """A row that could not be decoded or encoded when it was read."""


def mapped(source: Any, function: Callable[[Any], Any]) -> table.Source:
    """The source with a function applied to each row when it is read.

    If the source or the function raises ValueError, reading the row raises BadRow,
    which names the row.
    """
    return _Mapped(source, function)


def encoded(
    source: table.Source,
    tokenizer: Any,
    *,
    length: int,
    prompt: str = "prompt",
    answer: str | None = "answer",
    prompt_format: table.PromptFormat = table.PLAIN,
    padding_side: str = "right",
) -> table.Source:
    """Rows of text encoded as by `data.encode`, each when it is read.

    Args:
        source: rows with the text fields `prompt` and `answer`.
        tokenizer: as for data.encode.
        length: L, the length of every row in tokens.
        prompt, answer: names of the fields; answer None encodes the prompt alone.
        prompt_format, padding_side: as for data.encode.
    Returns:
        A source of {"tokens": [L] int32, "mask": [L] bool, "answer": [L] bool}. Reading
        a row that is longer than L, or that lacks a text field, raises BadRow.
    """
    _checks.positive_int("data.encoded", length=length)
    fields = (prompt, answer) if answer else (prompt,)
    settings = dict(
        prompt_format=prompt_format, length=length, padding_side=padding_side
    )
    return mapped(source, partial(_encode, tokenizer, fields, settings))


def _encode(tokenizer, fields, settings, row) -> dict[str, np.ndarray]:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"data.encoded needs rows that are dicts, got {type(row).__name__}. "
            "Decode them with data.mapped first."
        )
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(
            f"data.encoded needs the fields {_checks.listed(fields)}, but the row has "
            f"{_checks.listed(row)}. Name the fields with prompt and answer."
        )
    for field in fields:
        if problem := _checks.not_text(row[field]):
            raise ValueError(
                f"data.encoded needs texts, got {problem} for {field!r}. Remove the "
                "row, or convert it to a text with data.mapped."
            )
    texts = [[row[field]] for field in fields]
    rows = table.encode(tokenizer, *texts, **settings)
    return {column: values[0] for column, values in rows.items()}


class _Mapped(NamedTuple):
    source: Any
    function: Callable[[Any], Mapping[str, Any]]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row):
        try:
            return self.function(self.source[row])
        except ValueError as error:
            # `error` counts the rows of a table that holds this row alone.
            raise BadRow(f"Row {row} of the source: {error}") from error
