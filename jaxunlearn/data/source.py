# SPDX-License-Identifier: Apache-2.0
"""Sources made of other sources: rows that are decoded and encoded when they are read.

    lines = jsonl.open_jsonl("retain.jsonl", ("prompt", "answer"))
    retain = source.encoded(lines, tokenizer, length=256)

Anything with a length and rows by number is a source: such a file, a list of dicts,
grain's ArrayRecordDataSource (`mapped` with json.loads), a data set of Hugging Face.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import table


class BadRow(ValueError):
    """A row that could not be decoded or encoded when its turn came."""


def mapped(source: Any, function: Callable[[Any], Any]) -> table.Source:
    """The source with a function applied to each row as it is read.

    A ValueError of the source or the function becomes a BadRow that names the row.
    """
    return _Mapped(source, function)


def encoded(
    source: table.Source,
    tokenizer: Any,
    *,
    length: int,
    prompt: str = "prompt",
    answer: str | None = "answer",
    pad: str = "right",
) -> table.Source:
    """Rows of texts as table.encode would make them, each when it is read.

    Args:
        source: rows with the fields `prompt` and `answer`, texts.
        tokenizer: as for table.encode.
        length: L of every row.
        prompt, answer: names of the fields; without answer, all tokens of the prompt
            are read as one.
        pad: the side that is padded.
    Returns:
        A source of {"tokens": [L] int32, "mask": [L] bool, "answer": [L] bool}. Reading
        a row that is longer than L, or lacks a field or a text there, raises BadRow.
    """
    _checks.positive_int("source.encoded", length=length)
    fields = (prompt, answer) if answer else (prompt,)
    return mapped(source, partial(_encode, tokenizer, fields, length, pad))


def _encode(tokenizer, fields, length, pad, row) -> dict[str, np.ndarray]:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"source.encoded needs rows that are dicts, got {type(row).__name__}. "
            "Decode them by data.mapped first."
        )
    missing = [field for field in fields if field not in row]
    if missing:
        raise ValueError(
            f"source.encoded needs the fields {_checks.listed(fields)}, but there is "
            f"{_checks.listed(row)}. Name the fields by prompt and answer."
        )
    for field in fields:
        if not isinstance(row[field], str):
            raise ValueError(
                f"source.encoded needs texts, got {row[field]!r} for {field!r}. Leave "
                "the row out, or make it a text by data.mapped."
            )
    texts = [[row[field]] for field in fields]
    whole = table.encode(tokenizer, *texts, length=length, pad=pad)
    return {column: values[0] for column, values in whole.items()}


class _Mapped(NamedTuple):
    source: Any
    function: Callable[[Any], Mapping[str, Any]]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row):
        try:
            return self.function(self.source[row])
        except ValueError as error:
            raise BadRow(f"Row {row}, read alone: {error}") from error
