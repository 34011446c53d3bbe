# SPDX-License-Identifier: Apache-2.0
"""Tables: dicts of NumPy columns, rows first, with static shapes.

Language columns are `tokens` [n, L] int32, `mask` [n, L] bool (True: a real token) and
`answer` [n, L] bool (True: the loss reads this token as a target). Batches are drawn in
an order that depends on the seed, the stream's name and the batch's number alone, so a
run can be resumed anywhere with `skip`. What does not fit in memory is a *source*, read
row by row; it goes wherever batches are drawn. data.loader reads ahead with grain.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data._encode import PADS
from jaxunlearn.data._encode import ROUND_TO as ROUND_TO
from jaxunlearn.data._encode import chat as chat
from jaxunlearn.data._encode import encode as encode
from jaxunlearn.data._encode import encode_text as encode_text

Table = Mapping[str, np.ndarray]


class Source(Protocol):
    """Rows that are read one by one, in any thread: a list of dicts, an array_record
    file, a data set of Hugging Face. Each row is a dict of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


def num_rows(table: Table | Source, *, name: str = "data") -> int:
    """How many rows a table or a source has.

    Raises:
        ValueError: if it has none, or its columns differ in rows; the message says
            `name`.
    """
    counts = {"": len(table)}
    if isinstance(table, Mapping):
        counts = {column: len(values) for column, values in table.items()}
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{column} {count}" for column, count in counts.items())
        raise ValueError(f"The {name} needs columns of as many rows, got {came}.")
    if not any(counts.values()):
        raise ValueError(
            f"The {name} set is empty: at least one row was needed, got none. Check "
            "the file or the filter it came from, or take the stream out."
        )
    return next(iter(counts.values()))


def select(
    source: Table | Source, index: Iterable[int], *, name: str = "data"
) -> dict[str, np.ndarray]:
    """The rows of these numbers, as a table.

    Raises:
        TypeError, ValueError: if rows of a source are no dicts, or differ in columns or
            shapes; the message says `name`.
    """
    index = np.asarray(index)
    if isinstance(source, Mapping):
        return {column: np.asarray(values)[index] for column, values in source.items()}
    read = [(row, source[row]) for row in index.tolist()]
    first, like = read[0]
    for row, values in read:
        if not isinstance(values, Mapping):
            raise TypeError(
                f"The {name} source needs rows that are dicts of arrays, got "
                f"{type(values).__name__} in row {row}. Decode it by data.mapped."
            )
        shapes = {column: np.shape(x) for column, x in values.items()}
        wanted = {column: np.shape(x) for column, x in like.items()}
        if shapes != wanted:
            raise ValueError(
                f"The {name} source needs rows of one shape, got {wanted} in row "
                f"{first} and {shapes} in row {row}. Pad them, as data.encoded does."
            )
    return {c: np.stack([np.asarray(values[c]) for _, values in read]) for c in like}


def with_columns(source: Table | Source, columns: Table) -> Table | Source:
    """The source with more columns, or others of these names, held in memory."""
    if isinstance(source, Mapping):
        return dict(source) | dict(columns)
    return _Wider(source, columns)


class _Wider(NamedTuple):
    source: Source
    columns: Table

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row):
        return {**self.source[row], **{c: x[row] for c, x in self.columns.items()}}


def batches(
    table: Table | Source,
    size: int,
    *,
    seed: int,
    epochs: int | None = None,
    skip: int = 0,
    name: str = "data",
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches of exactly `size` rows, endless unless `epochs` is given.

    Each epoch is a permutation of its own and a batch may reach from one epoch into the
    next, so after any number of batches no row was seen more than once more than
    another. Batch k depends on (seed, name, k) alone.

    Args:
        table: columns of n rows, or a source of them; n may be smaller than `size`.
        size: B.
        seed: whole number >= 0.
        epochs: stop once every row was seen this often; the last batch is filled from
            the next epoch.
        skip: batches to leave out at the beginning, to resume a run.
        name: the stream's name: it says which stream is empty, and separates the orders
            of two streams under one seed.
    Yields:
        Tables of `size` rows.
    Raises:
        ValueError: at once, if the table is empty.
    """
    count = num_rows(table, name=name)
    _checks.not_negative("table.batches", skip=skip)
    if epochs is not None:
        _checks.positive_int("table.batches", epochs=epochs)
    read = _batch(table, size, seed, name, (0, 1))
    if epochs is None:
        return map(read, itertools.count(int(skip)))
    return map(read, range(int(skip), -(-epochs * count // size)))


def streams(
    tables: Mapping[str, Table | Source],
    sizes: Mapping[str, int] | int,
    *,
    seed: int,
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """One batch of every stream, endlessly: {"forget": batch, "retain": batch, ...}.

    Args:
        tables: stream name -> table, or a source of rows.
        sizes: batch size of every stream, or one for all.
        seed: whole number >= 0; each stream shuffles in an order of its own.
        skip: steps to leave out at the beginning, to resume a run.
        share: (process, processes), such as (jax.process_index(), jax.process_count()):
            only this process's rows of each batch are read, an equal run of them in
            order. Together the processes have the batches that one process would have.
    Raises:
        ValueError: at once, naming the stream whose table is empty, or whose rows do
            not divide by the processes.
        KeyError: if `sizes` lacks a stream.
    """
    _checks.not_negative("table.streams", skip=skip)
    return map(
        batch_fn(tables, sizes, seed=seed, share=share), itertools.count(int(skip))
    )


def batch_fn(
    tables: Mapping[str, Table | Source],
    sizes: Mapping[str, int] | int,
    *,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """The function from a step's number to what `streams` yields there.

    The order of the rows is made anew for every epoch, and that of two epochs of each
    stream is kept: 16 bytes a row.
    """
    if not tables:
        raise ValueError("table.streams needs at least one stream, got none.")
    if isinstance(sizes, Mapping):
        fix = "Give a batch size for every stream."
        _checks.has_keys("table.streams", "sizes for", tables, sizes, fix)
        _checks.has_keys("table.streams", "tables for", sizes, tables, fix)
    else:
        sizes = dict.fromkeys(tables, sizes)
    each = {
        name: _batch(source, sizes[name], seed, name, share)
        for name, source in tables.items()
    }
    return lambda step: {name: batch(step) for name, batch in each.items()}


def _batch(source, size, seed, name, share):
    """From a batch's number to the batch, this process's rows of it."""
    count = num_rows(source, name=name)
    _checks.positive_int("table.batches", size=size)
    _checks.not_negative("table.batches", seed=seed)
    part = _part(size, share, name)

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch):
        key = [seed, zlib.crc32(name.encode()), epoch]
        return np.random.default_rng(key).permutation(count)

    def batch(number):
        epoch, place = np.divmod(number * size + np.arange(size)[part], count)
        index = [order(each)[place[epoch == each]] for each in np.unique(epoch)]
        return select(source, np.concatenate(index), name=name)

    return batch


def _part(size: int, share: tuple[int, int], name: str) -> slice:
    process, processes = share
    if not 0 <= process < processes:
        raise ValueError(
            f"A table needs share=(process, processes) with 0 <= process < processes, "
            f"got {share}."
        )
    if size % processes:
        raise ValueError(
            f"A table needs batches that {processes} processes can share equally, got "
            f"{size} rows for {name!r}. Change the batch size."
        )
    own = size // processes
    return slice(process * own, (process + 1) * own)


def eval_batches(
    table: Table | Source, size: int, *, share: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """All rows in order, in batches of one size, for evaluation.

    The last batch is filled with copies of the last row; the extra column `valid` [B]
    bool is False there. With a share, as in `streams`, a batch has this process's rows
    alone, but all of `valid`.

    Raises:
        ValueError: at once, if the table is empty, or a batch cannot be shared.
    """
    count = num_rows(table)
    _checks.positive_int("table.padded", size=size)
    return _padded(table, count, size, _part(size, share, "batch"))


def concat(tables: Sequence[Table], *, pad: str = "right") -> dict[str, np.ndarray]:
    """One table below the other, those with shorter rows padded to the longest.

    Args:
        tables: tables with the same columns; columns of more than one axis are padded
            along the second.
        pad: the side to pad; the tables' own side.
    Raises:
        ValueError: if there are no tables or their columns differ.
    """
    _checks.one_of("table.concat", PADS, pad=pad)
    if not tables:
        raise ValueError("table.concat needs at least one table, got none.")
    names = list(tables[0])
    for i, table in enumerate(tables):
        if set(table) != set(names):
            raise ValueError(
                f"table.concat needs tables with the same columns, got "
                f"{_checks.listed(names)} in the first and {_checks.listed(table)} in "
                f"table {i}. Drop or add columns first."
            )
    joined = {}
    for name in names:
        columns = [np.asarray(table[name]) for table in tables]
        if columns[0].ndim > 1:
            most = max(column.shape[1] for column in columns)
            columns = [_widen(column, most, pad) for column in columns]
        joined[name] = np.concatenate(columns)
    return joined


def check_length(table: Table, positions: int) -> None:
    """Raises ValueError if a row has more real tokens than the model has positions."""
    lengths = np.asarray(table["mask"]).sum(axis=1)
    long = np.flatnonzero(lengths > positions)
    if long.size:
        row = long[0]
        raise ValueError(
            f"The model needs rows of at most {positions} tokens (its positions), but "
            f"row {row} has {lengths[row]} ({long.size} of {len(lengths)} rows are too "
            "long). Shorten or leave out these rows, or take a model with more "
            "positions."
        )


def _padded(table, count, size, part):
    for first in range(0, count, size):
        index = np.arange(first, first + size)
        batch = select(table, np.minimum(index, count - 1)[part])
        yield {**batch, "valid": index < count}


def _widen(column: np.ndarray, length: int, pad: str) -> np.ndarray:
    more = length - column.shape[1]
    sides = (0, more) if pad == "right" else (more, 0)
    return np.pad(column, [(0, 0), sides] + [(0, 0)] * (column.ndim - 2))
