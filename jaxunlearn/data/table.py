# SPDX-License-Identifier: Apache-2.0
"""Tables: dicts of NumPy columns whose first axis counts rows; batches of static shape.

Columns of text are `tokens` [n, L] int32, `mask` [n, L] bool (True: a real token) and
`answer` [n, L] bool (True: the loss uses this token as a target). The rows of a batch
depend only on the seed, the name of the stream and the number of the batch, so `skip`
resumes a run at any step. A *source* is data that is read row by row because it does
not fit in memory; every function here that takes a table also takes a source.
`data.loader` reads the same batches ahead with grain.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data._encode import PADDING_SIDES as PADDING_SIDES
from jaxunlearn.data._encode import ROUND_TO as ROUND_TO
from jaxunlearn.data._encode import begun as begun
from jaxunlearn.data._encode import encode as encode
from jaxunlearn.data._encode import encode_text as encode_text
from jaxunlearn.data._encode import rounded_length as rounded_length
from jaxunlearn.data._prompt_format import PLAIN as PLAIN
from jaxunlearn.data._prompt_format import Conversation as Conversation
from jaxunlearn.data._prompt_format import PromptFormat as PromptFormat
from jaxunlearn.data._prompt_format import Rendered as Rendered
from jaxunlearn.data._prompt_format import end_ids as end_ids
from jaxunlearn.data._prompt_format import render as render

Table = Mapping[str, np.ndarray]


class Source(Protocol):
    """Rows that are read one by one, from any thread; each row is a dict of arrays.

    A list of dicts, an array_record file and a Hugging Face dataset are sources.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


def num_rows(table: Table | Source, *, name: str = "data") -> int:
    """The number of rows of a table or a source.

    Args:
        table: a table or a source.
        name: what error messages call it.
    Raises:
        ValueError: if there are no rows, or the columns differ in length.
    """
    counts = {"": len(table)}
    if isinstance(table, Mapping):
        counts = {column: len(values) for column, values in table.items()}
    if len(set(counts.values())) > 1:
        came = ", ".join(f"{column} {count}" for column, count in counts.items())
        raise ValueError(f"The {name} table needs columns of one length, got {came}.")
    if not any(counts.values()):
        raise ValueError(
            f"The {name} set is empty: it needs at least one row. Check the file or "
            "the filter it came from, or remove the stream."
        )
    return next(iter(counts.values()))


def select(
    source: Table | Source, index: Iterable[int], *, name: str = "data"
) -> dict[str, np.ndarray]:
    """The rows with these indices, as a table.

    Args:
        source: a table or a source.
        index: row indices.
        name: what error messages call it.
    Raises:
        TypeError, ValueError: if rows of a source are not dicts, or differ in columns
            or shapes.
    """
    index = np.asarray(index)
    if isinstance(source, Mapping):
        return {column: np.asarray(values)[index] for column, values in source.items()}
    read = [(row, source[row]) for row in index.tolist()]
    first_row, first = read[0]
    for row, values in read:
        if not isinstance(values, Mapping):
            raise TypeError(
                f"The {name} source needs rows that are dicts of arrays, got "
                f"{type(values).__name__} in row {row}. Decode rows with data.mapped."
            )
        shapes = {column: np.shape(x) for column, x in values.items()}
        wanted = {column: np.shape(x) for column, x in first.items()}
        if shapes != wanted:
            raise ValueError(
                f"The {name} source needs rows of one shape, got {wanted} in row "
                f"{first_row} and {shapes} in row {row}. Pad them, as data.encoded "
                "does."
            )
    return {c: np.stack([np.asarray(values[c]) for _, values in read]) for c in first}


def with_columns(source: Table | Source, columns: Table) -> Table | Source:
    """The table or source with columns added or replaced; these stay in memory."""
    if isinstance(source, Mapping):
        return dict(source) | dict(columns)
    return _WithColumns(source, columns)


class _WithColumns(NamedTuple):
    source: Source
    columns: Table

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row):
        return {**self.source[row], **{c: x[row] for c, x in self.columns.items()}}


def batches(
    table: Table | Source,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    skip: int = 0,
    name: str = "data",
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches of exactly `batch_size` rows; endless unless `epochs` is given.

    Every epoch is a new permutation of the rows. A batch may contain the end of one
    epoch and the start of the next, so at any time the numbers of times that two rows
    were drawn differ by at most one. Batch k depends on (seed, name, k) only.

    Args:
        table: n rows; n may be smaller than `batch_size`.
        batch_size: B.
        seed: integer >= 0.
        epochs: stop when every row was drawn this many times; the last batch is filled
            with rows of the next epoch.
        skip: number of batches to omit at the start, to resume a run.
        name: name of the stream. Streams of different names are shuffled independently
            under the same seed; error messages use the name.
    Yields:
        Tables of `batch_size` rows.
    Raises:
        ValueError: when called, if the table is empty.
    """
    rows = num_rows(table, name=name)
    _checks.not_negative("data.batches", skip=skip)
    if epochs is not None:
        _checks.positive_int("data.batches", epochs=epochs)
    batch = _batch_fn(table, batch_size, seed, name, (0, 1))
    if epochs is None:
        return map(batch, itertools.count(int(skip)))
    return map(batch, range(int(skip), -(-epochs * rows // batch_size)))


def streams(
    tables: Mapping[str, Table | Source],
    batch_size: int | Mapping[str, int],
    *,
    seed: int,
    skip: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """One batch of every stream per step, endlessly: {"forget": batch, ...}.

    Streams are shuffled independently, except that tables which `data.paired` returned
    together, and tables with the same column `id`, are drawn in one order: their
    batches have the same rows in the same places.

    Args:
        tables: stream name -> table or source.
        batch_size: rows per step of every stream, or a dict with one number for each
            stream; over all processes.
        seed: integer >= 0.
        skip: number of steps to omit at the start, to resume a run.
        shard: (process index, number of processes), such as (jax.process_index(),
            jax.process_count()). Each process reads an equal, contiguous part of every
            batch; the parts together are the batch that one process would read.
    Raises:
        ValueError: when called, naming the stream, if a table is empty, the number of
            processes does not divide a batch size, or tables that are pairs differ in
            their rows or batch sizes.
        KeyError: if `batch_size` lacks a stream.
    """
    _checks.not_negative("data.streams", skip=skip)
    step = batch_fn(tables, batch_size, seed=seed, shard=shard)
    return map(step, itertools.count(int(skip)))


def batch_fn(
    tables: Mapping[str, Table | Source],
    batch_size: int | Mapping[str, int],
    *,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> Callable[[int], dict[str, dict[str, np.ndarray]]]:
    """The function from a step's number to what `streams` yields at that step.

    The permutations of the last two epochs of each stream stay in memory: 16 bytes per
    row. Arguments and errors are those of `streams`.
    """
    if not tables:
        raise ValueError("data.streams needs at least one stream, got none.")
    if isinstance(batch_size, Mapping):
        fix = "Give a batch size for every stream."
        _checks.has_keys("data.streams", "sizes for", tables, batch_size, fix)
        _checks.has_keys("data.streams", "tables for", batch_size, tables, fix)
    else:
        batch_size = dict.fromkeys(tables, batch_size)
    orders = _orders(tables, batch_size)
    functions = {
        name: _batch_fn(source, batch_size[name], seed, name, shard, orders[name])
        for name, source in tables.items()
    }
    unread = [name for name, x in tables.items() if column(x, "pair") is None]

    def step(number):
        made = {name: batch(number) for name, batch in functions.items()}
        for name in unread:
            if "pair" in made[name]:
                raise ValueError(
                    f"data.streams needs the column 'pair' of {name!r} in memory, got "
                    "a source that reads it with its rows. Apply data.paired last."
                )
        return made

    return step


def _orders(
    tables: Mapping[str, Table | Source], batch_size: Mapping[str, int]
) -> dict[str, str]:
    """Stream -> the name that its order is drawn by: for streams whose rows belong
    together one name, the last of theirs in the alphabet."""
    return {
        name: max(
            other
            for other in tables
            if other == name or _linked(name, other, tables, batch_size)
        )
        for name in tables
    }


def _linked(one, other, tables, batch_size) -> bool:
    """Whether row i of both tables belongs together; pairs out of order raise."""
    sizes = [batch_size[name] for name in (one, other)]
    pairs, ids = (
        [column(tables[name], label) for name in (one, other)]
        for label in ("pair", "id")
    )
    if any(x is None for x in pairs) or not np.isin(*pairs).any():
        known = all(x is not None for x in ids)
        return known and sizes[0] == sizes[1] and np.array_equal(*ids)
    if not np.array_equal(*pairs):
        raise ValueError(
            f"data.streams needs the pairs {one!r} and {other!r} with the same rows in "
            "the same order, got tables that were changed after data.paired. Change "
            "them first, and then pair them."
        )
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"data.streams needs one batch_size for the pairs {one!r} and {other!r}, "
            f"got {sizes[0]} and {sizes[1]}."
        )
    return True


def column(source: Table | Source, name: str) -> np.ndarray | None:
    """A column that is in memory; None if there is none."""
    if isinstance(source, Mapping):
        return source.get(name)
    if isinstance(source, _WithColumns):
        found = source.columns.get(name)
        return column(source.source, name) if found is None else found
    return None


def _batch_fn(source, batch_size, seed, name, shard, order_name=None):
    """The function from a batch's number to this process's rows of the batch."""
    rows = num_rows(source, name=name)
    _checks.positive_int("data.streams", batch_size=batch_size)
    _checks.not_negative("data.streams", seed=seed)
    part = _part(batch_size, shard, name)

    @functools.lru_cache(maxsize=2)  # a batch may contain rows of two epochs
    def order(epoch):
        key = [seed, zlib.crc32((order_name or name).encode()), epoch]
        return np.random.default_rng(key).permutation(rows)

    def batch(number):
        drawn = number * batch_size + np.arange(batch_size)[part]
        epochs, places = np.divmod(drawn, rows)
        index = [order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return select(source, np.concatenate(index), name=name)

    return batch


def _part(batch_size: int, shard: tuple[int, int], name: str) -> slice:
    """The rows of a batch that this process reads."""
    index, processes = shard
    if not 0 <= index < processes:
        raise ValueError(
            "Batches need shard=(process index, number of processes) with "
            f"0 <= index < number, got shard={shard}."
        )
    if batch_size % processes:
        raise ValueError(
            f"Batches need a batch_size that {processes} processes divide, got "
            f"batch_size={batch_size} for {name!r}. Change the batch size."
        )
    size = batch_size // processes
    return slice(index * size, (index + 1) * size)


def eval_batches(
    table: Table | Source, batch_size: int, *, shard: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """All rows in order, in batches of one size, for evaluation.

    The last batch is filled with copies of the last row. The extra column `valid` [B]
    bool is False for these copies. With a shard, as in `streams`, a batch holds only
    this process's rows, but `valid` of all processes.

    Raises:
        ValueError: when called, if the table is empty or the number of processes does
            not divide `batch_size`.
    """
    rows = num_rows(table)
    _checks.positive_int("data.eval_batches", batch_size=batch_size)
    part = _part(batch_size, shard, "evaluation")

    def batch(first):
        index = np.arange(first, first + batch_size)
        found = select(table, np.minimum(index, rows - 1)[part])
        return {**found, "valid": index < rows}

    return map(batch, range(0, rows, batch_size))


def concat(
    tables: Sequence[Table], *, padding_side: str = "right"
) -> dict[str, np.ndarray]:
    """Tables joined along their rows; shorter rows are padded to the longest.

    Args:
        tables: tables with the same columns. Columns of two or more axes are padded
            along the second with zeros.
        padding_side: "right" or "left", the side on which the tables are padded.
    Raises:
        ValueError: if there are no tables or their columns differ.
    """
    _checks.one_of("data.concat", PADDING_SIDES, padding_side=padding_side)
    if not tables:
        raise ValueError("data.concat needs at least one table, got none.")
    names = list(tables[0])
    for i, table in enumerate(tables):
        if set(table) != set(names):
            raise ValueError(
                f"data.concat needs tables with the same columns, got "
                f"{_checks.listed(names)} in the first and {_checks.listed(table)} in "
                f"table {i}. Drop or add columns first."
            )
    joined = {}
    for name in names:
        columns = [np.asarray(table[name]) for table in tables]
        if columns[0].ndim > 1:
            length = max(column.shape[1] for column in columns)
            columns = [_padded(column, length, padding_side) for column in columns]
        joined[name] = np.concatenate(columns)
    return joined


def _padded(column: np.ndarray, length: int, padding_side: str) -> np.ndarray:
    missing = length - column.shape[1]
    sides = (0, missing) if padding_side == "right" else (missing, 0)
    return np.pad(column, [(0, 0), sides] + [(0, 0)] * (column.ndim - 2))


def check_length(table: Table, max_length: int) -> None:
    """Raises ValueError if a row has more than `max_length` real tokens."""
    lengths = np.asarray(table["mask"]).sum(axis=1)
    long = np.flatnonzero(lengths > max_length)
    if long.size:
        row = long[0]
        raise ValueError(
            f"The model needs rows of at most {max_length} tokens (its positions), but "
            f"row {row} has {lengths[row]} ({long.size} of {len(lengths)} rows are too "
            "long). Shorten or remove these rows, or use a model with more positions."
        )
