# SPDX-License-Identifier: Apache-2.0
"""Tables: dicts of NumPy columns, rows first, with static shapes.

Language columns are `tokens` [n, L] int32, `mask` [n, L] bool (True: a real token) and
`answer` [n, L] bool (True: the loss reads this token as a target). Batches are drawn in
an order that depends on the seed, the stream's name and the batch's number alone, so a
run can be resumed anywhere with `skip`.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxunlearn import _checks

Table = Mapping[str, np.ndarray]

ROUND_TO = 8
PADS = ("right", "left")


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    length: int | None = None,
    pad: str = "right",
) -> dict[str, np.ndarray]:
    """Tokenises prompt + " " + answer as one text, and marks the answer's tokens.

    The two are tokenised jointly, as the model would read them, and the answer is found
    by its place among the characters: merges across the boundary cannot shift it. Every
    token that reaches beyond the prompt belongs to the answer, its leading space
    included.

    Args:
        tokenizer: a fast Hugging Face tokenizer. Special tokens that it puts in front
            are kept, those that it puts behind are dropped.
        prompts: n texts.
        answers: n texts without leading space, or None for the prompts alone; `answer`
            is `mask` then.
        length: L; None takes the longest row, rounded up to a multiple of 8.
        pad: the side that is padded; "left" for generation.
    Returns:
        {"tokens": [n, L] int32, "mask": [n, L] bool, "answer": [n, L] bool}.
    Raises:
        ValueError: if a row is longer than `length` or an answer is empty.
    """
    _checks.one_of("table.encode", PADS, pad=pad)
    if isinstance(prompts, str) or isinstance(answers, str):
        raise TypeError(
            "table.encode needs sequences of texts, got one text. Put it in a list."
        )
    prompts = list(prompts)
    if answers is None:
        texts, starts = prompts, [0] * len(prompts)
    else:
        answers = list(answers)
        if len(answers) != len(prompts):
            raise ValueError(
                f"table.encode needs one answer a prompt, got {len(prompts)} prompts "
                f"and {len(answers)} answers."
            )
        for row, answer in enumerate(answers):
            if not answer.strip():
                raise ValueError(
                    f"table.encode needs answers of at least one token, but row {row} "
                    f"({prompts[row]!r}) has {answer!r}. Leave the row out."
                )
        texts = [f"{p} {a}" for p, a in zip(prompts, answers, strict=True)]
        starts = [len(prompt) for prompt in prompts]

    coded = []
    for text, start in zip(texts, starts, strict=True):
        ids, ends, _ = _tokenise(tokenizer, text)
        coded.append((ids, [end > start for end in ends]))
    longest = max((len(ids) for ids, _ in coded), default=1)
    if length is None:
        length = max(ROUND_TO, -(-longest // ROUND_TO) * ROUND_TO)
    _checks.positive_int("table.encode", length=length)
    if longest > length:
        row = next(i for i, (ids, _) in enumerate(coded) if len(ids) > length)
        raise ValueError(
            f"table.encode needs rows of at most length={length} tokens, but row {row} "
            f"has {len(coded[row][0])}: {_short(texts[row])}. "
            f"Set length to {longest} or more (the longest row), or shorten the text."
        )

    table = _blank(len(coded), length, _pad_id(tokenizer))
    for row, (ids, answer) in enumerate(coded):
        at = slice(0, len(ids)) if pad == "right" else slice(length - len(ids), length)
        table["tokens"][row, at] = ids
        table["mask"][row, at] = True
        table["answer"][row, at] = answer if answers is not None else True
    return table


def encode_text(tokenizer: Any, text: str, *, length: int) -> dict[str, np.ndarray]:
    """Cuts prose into rows of exactly `length` tokens; what is left over is dropped.

    Special tokens that the tokenizer puts in front of a text begin every row and are no
    answer.

    Returns:
        {"tokens", "mask", "answer"}, each [n, length].
    Raises:
        ValueError: if the text fills no row.
    """
    _checks.positive_int("table.encode_text", length=length)
    ids, _, front = _tokenise(tokenizer, text)
    prefix, ids = ids[:front], ids[front:]
    room = length - front
    count = len(ids) // room if room > 0 else 0
    if count == 0:
        raise ValueError(
            f"table.encode_text needs a text of at least one row of length={length} "
            f"tokens, got {len(ids)} tokens. Give more text or a smaller length."
        )
    table = _blank(count, length, 0)
    table["tokens"][:, :front] = prefix
    table["tokens"][:, front:] = np.asarray(ids[: count * room]).reshape(count, room)
    table["mask"][:] = True
    table["answer"][:, front:] = True
    return table


def rows(table: Table, *, name: str = "data") -> int:
    """How many rows a table has.

    Raises:
        ValueError: if it has none, or its columns differ in rows; the message says
            `name`.
    """
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


def batches(
    table: Table,
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
        table: columns of n rows; n may be smaller than `size`.
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
    count = rows(table, name=name)
    _checks.positive_int("table.batches", size=size)
    _checks.not_negative("table.batches", seed=seed, skip=skip)
    if epochs is not None:
        _checks.positive_int("table.batches", epochs=epochs)
    stop = None if epochs is None else -(-epochs * count // size)
    return _batches(table, count, size, (seed, zlib.crc32(name.encode())), skip, stop)


def streams(
    tables: Mapping[str, Table],
    sizes: Mapping[str, int] | int,
    *,
    seed: int,
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """One batch of every stream, endlessly: {"forget": batch, "retain": batch, ...}.

    Args:
        tables: stream name -> table.
        sizes: batch size of every stream, or one for all.
        seed: whole number >= 0; each stream shuffles in an order of its own.
        skip: steps to leave out at the beginning, to resume a run.
        share: (process, processes), such as (jax.process_index(), jax.process_count()):
            only this process's rows of each batch come, an equal run of them in order.
            Together the processes have the batches that one process would have.
    Raises:
        ValueError: at once, naming the stream whose table is empty, or whose rows do
            not divide by the processes.
        KeyError: if `sizes` lacks a stream.
    """
    if not tables:
        raise ValueError("table.streams needs at least one stream, got none.")
    if isinstance(sizes, Mapping):
        fix = "Give a batch size for every stream."
        _checks.has_keys("table.streams", "sizes for", tables, sizes, fix)
        _checks.has_keys("table.streams", "tables for", sizes, tables, fix)
    if not isinstance(sizes, Mapping):
        sizes = dict.fromkeys(tables, sizes)
    each = {}
    for name, table in tables.items():
        part = _part(sizes[name], share, name)
        whole = batches(table, sizes[name], seed=seed, skip=skip, name=name)
        each[name] = map(partial(_cut, part), whole)
    return _together(each)


def own_rows(batch: Table, share: tuple[int, int]) -> dict[str, np.ndarray]:
    """The rows of a batch that a process hands to the mesh; `share` as in `streams`."""
    return _cut(_part(rows(batch), share, "batch"), batch)


def _cut(part: slice, batch: Table) -> dict[str, np.ndarray]:
    return {name: column[part] for name, column in batch.items()}


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


def padded(table: Table, size: int) -> Iterator[dict[str, np.ndarray]]:
    """All rows in order, in batches of one size, for evaluation.

    The last batch is filled with copies of the last row; the extra column `valid` [B]
    bool is False there.

    Raises:
        ValueError: at once, if the table is empty.
    """
    count = rows(table)
    _checks.positive_int("table.padded", size=size)
    return _padded(table, count, size)


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


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[int], int]:
    """Ids, the character where each ends, and how many special tokens lead."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "table needs a fast tokenizer (one that knows character offsets), got "
            f"{type(tokenizer).__name__}. Load the tokenizer.json of the model."
        )
    coded = tokenizer(
        text,
        truncation=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # rows longer than the model are check_length's affair
    )
    ids, ends = coded["input_ids"], [end for _, end in coded["offset_mapping"]]
    # A chat marker that is written out in the text is special too, but has its
    # characters.
    added = [
        bool(special) and start == end
        for special, (start, end) in zip(
            coded["special_tokens_mask"], coded["offset_mapping"], strict=True
        )
    ]
    last = len(ids)
    while last and added[last - 1]:
        last -= 1
    front = 0
    while front < last and added[front]:
        front += 1
    return ids[:last], ends[:last], front


def _pad_id(tokenizer: Any) -> int:
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def _blank(count: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    return {
        "tokens": np.full((count, length), pad_id, np.int32),
        "mask": np.zeros((count, length), np.bool_),
        "answer": np.zeros((count, length), np.bool_),
    }


def _batches(table, count, size, seed, skip, stop):
    number = int(skip)
    epoch, order = -1, np.arange(0)
    while stop is None or number < stop:
        taken = []
        first, last = number * size, (number + 1) * size
        while first < last:
            if first // count != epoch:
                epoch = first // count
                order = np.random.default_rng([*seed, epoch]).permutation(count)
            end = min(last, (epoch + 1) * count)
            taken.append(order[first - epoch * count : end - epoch * count])
            first = end
        yield _take(table, np.concatenate(taken))
        number += 1


def _together(each):
    while True:
        yield {name: next(stream) for name, stream in each.items()}


def _padded(table, count, size):
    for first in range(0, count, size):
        index = np.arange(first, first + size)
        batch = _take(table, np.minimum(index, count - 1))
        yield {**batch, "valid": index < count}


def _take(table: Table, index: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(column)[index] for name, column in table.items()}


def _widen(column: np.ndarray, length: int, pad: str) -> np.ndarray:
    more = length - column.shape[1]
    sides = (0, more) if pad == "right" else (more, 0)
    return np.pad(column, [(0, 0), sides] + [(0, 0)] * (column.ndim - 2))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
