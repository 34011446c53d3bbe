# SPDX-License-Identifier: Apache-2.0
"""Rows that know their file, so that an error about a value names file and line."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from jaxunlearn import _checks


class Rows(list):
    """A list of the rows of one file.

    Attributes:
        path: the file.
        lines: the line of each row, from 1; empty for a file without lines.
    """

    def __init__(
        self, rows: Iterable[Any], path: str | os.PathLike, lines: Sequence[int] = ()
    ):
        super().__init__(rows)
        self.path, self.lines = path, lines


def place(rows: Sequence[Any], row: int) -> str:
    """Where the row with this index comes from, as an error says it."""
    if not isinstance(rows, Rows):
        return f"row {row}"
    lined = len(rows.lines) == len(rows)
    return f"{rows.path}, {f'line {rows.lines[row]}' if lined else f'row {row}'}"


def texts(rows: Sequence[Any], column: str, *, fix: str = "") -> list[str]:
    """The texts in one column.

    Args:
        rows: dicts, of `read_rows` for example.
        column: name of the column.
        fix: what to do about a value that is not a text.
    Raises:
        KeyError: if a row has no such column.
        ValueError: naming the file and the line (or the row) and the column, if a
            value is missing, is not a text, or cannot be encoded as UTF-8.
    """
    found = []
    for number, row in enumerate(rows):
        if column not in row:
            owner = f"{place(rows, number)}: the row"
            add = fix or "Name another column, or add it to every row."
            _checks.has_keys(owner, "the column", (column,), row, add)
        if problem := _checks.not_text(row[column]):
            raise ValueError(
                f"{place(rows, number)}: needs a text in the column {column!r}, got "
                f"{problem}. {fix or 'Correct or remove the row.'}"
            )
        found.append(row[column])
    return found
