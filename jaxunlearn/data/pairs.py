# SPDX-License-Identifier: Apache-2.0
"""Tables whose rows belong together, such as two answers to each question."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import table as tables

COLUMN = "pair"
_CHUNK = 1024  # rows of a source that are compared at a time


def paired(
    rows: Mapping[str, tables.Table | tables.Source],
    *,
    ids: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, tables.Table | tables.Source]:
    """The tables with a column `pair` that ties row i of each to row i of the others.

        both = data.paired({"forget": forget, "alternate": alternate})
        batches = data.streams({**both, "retain": retain}, 4, seed=0)

    `data.streams` and `data.loader.streams` draw tied tables in one order, and
    `terms.on_pairs` (DPO, IdkDPO, AltPO) needs the column. Row i of all tables must
    have the same prompt: the tokens before the answer are compared. A source is read
    once for this.

    Args:
        rows: two or more tables or sources, by the names of their streams.
        ids: table -> a value for each of its rows, such as the texts of the prompts;
            these are compared in place of the tokens. If None and every table has a
            column `id`, that column is compared.
    Returns:
        The same names with the tables, each with `pair` [n] int32.
    Raises:
        ValueError: naming table and row, if there are fewer than two tables, or they
            differ in their numbers of rows, in a prompt or in an id.
    """
    owner = "data.paired"
    if len(rows) < 2:
        raise ValueError(
            f"{owner} needs two or more tables, got {_checks.listed(rows)}. Pass "
            '{"forget": forget, "alternate": alternate}.'
        )
    counts = {name: tables.num_rows(each, name=name) for name, each in rows.items()}
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"{owner} needs tables of equally many rows, got {came}. Drop the same "
            "rows of each, as data.drop_long does for rows with several answers."
        )
    (first, count), *others = counts.items()
    known = {name: tables.column(each, "id") for name, each in rows.items()}
    if ids is None and all(each is not None for each in known.values()):
        ids = known
    if ids is None:
        for name, _ in others:
            _same_prompts(owner, first, rows[first], name, rows[name], count)
    else:
        _same_ids(owner, counts, ids)
    start = zlib.crc32("/".join(sorted(rows)).encode()) % 2**30
    column = {COLUMN: (start + np.arange(count)).astype(np.int32)}
    return {name: tables.with_columns(each, column) for name, each in rows.items()}


def _same_ids(owner, counts, ids):
    _checks.has_keys(owner, "ids of", counts, ids, "Give those of every table.")
    (first, count), *others = counts.items()
    for name, _ in others:
        one, other = (np.asarray(ids[x], object).tolist() for x in (first, name))
        if len(one) != count or len(other) != count:
            raise ValueError(
                f"{owner} needs one id for each of {count} rows, got {len(one)} for "
                f"{first!r} and {len(other)} for {name!r}."
            )
        for row, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                raise ValueError(
                    f"{owner} needs one id in row {row} of {first!r} and {name!r}, got "
                    f"{a!r} and {b!r}. Put the rows in one order."
                )


def _same_prompts(owner, first, one, name, other, count):
    for start in range(0, count, _CHUNK):
        index = range(start, min(start + _CHUNK, count))
        pair = [
            tables.select(each, index, name=label)
            for label, each in ((first, one), (name, other))
        ]
        prompts = zip(*map(_prompts, pair), strict=True)
        for row, (a, b) in enumerate(prompts, start):
            if a != b or not a:
                raise ValueError(
                    f"{owner} needs one prompt in row {row} of {first!r} and {name!r}, "
                    f"got the tokens {_checks.listed(a)} and {_checks.listed(b)}. Put "
                    "the rows in one order, or pass ids= to compare those instead."
                )


def _prompts(rows: tables.Table) -> list[list[int]]:
    """The real tokens before the answer of each row."""
    prompt = rows["mask"] & ~rows.get("answer", rows["mask"])
    pairs = zip(rows["tokens"], prompt, strict=True)
    return [tokens[where].tolist() for tokens, where in pairs]
