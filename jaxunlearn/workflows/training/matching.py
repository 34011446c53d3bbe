# SPDX-License-Identifier: Apache-2.0
"""Rows of several files that a method reads in pairs: matched, and dropped together."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import files


def matched(
    group: Sequence[str], texts: Mapping[str, list], found: Mapping[str, dict]
) -> dict[str, list[Any]]:
    """Puts the rows of the streams of a group in one order, that of the last.

    Args:
        group: names of the streams.
        texts: stream -> its rows; changed in place.
        found: stream -> its settings, with the name of the column of prompts.
    Returns:
        Stream -> what ties its rows to those of the others: their ids, or else their
        prompts.
    Raises:
        ValueError: naming the row, if a stream lacks an id of the last or has one
            twice; without ids, if the prompts differ.
    """
    *others, last = group
    if not all("id" in row for name in group for row in texts[name]):
        prompts = {
            name: [row[found[name]["prompt"]] for row in texts[name]] for name in group
        }
        for name in others:
            _same_prompts(name, last, prompts, texts)
        return prompts
    wanted = [row["id"] for row in texts[last]]
    for name in group:
        rows = {row["id"]: row for row in texts[name]}
        if len(rows) < len(texts[name]):
            raise ValueError(
                f"The stream {name!r} is read in pairs and needs unique ids, got "
                f"{len(rows)} ids in {len(texts[name])} rows. Remove the repeated rows."
            )
        missing = [x for x in wanted if x not in rows]
        if missing:
            raise ValueError(
                f"The stream {name!r} is read in pairs with {last!r} and needs a row "
                f"for each of its ids, but {_checks.listed(missing)} have none "
                f"({len(missing)} of {len(wanted)}). Add or remove such rows."
            )
        texts[name][:] = [rows[x] for x in wanted]
    return dict.fromkeys(group, wanted)


def _same_prompts(name, other, prompts, texts):
    pair = zip(prompts[name], prompts[other], strict=False)
    differ = [row for row, (a, b) in enumerate(pair) if a != b]
    counts = [len(prompts[x]) for x in (name, other)]
    if not differ and counts[0] == counts[1]:
        return
    row = differ[0] if differ else min(counts)
    places = [
        f"{prompts[x][row]!r} ({files.place(texts[x], row)})"
        if row < len(prompts[x])
        else f"no such row in {x!r}"
        for x in (name, other)
    ]
    raise ValueError(
        f"The streams {name!r} and {other!r} are read in pairs and need one prompt in "
        f"row {row}, got {places[0]} and {places[1]}. Put the rows in one order, or "
        "give all rows of both an `id`."
    )


def drop_long(
    group: Sequence[str],
    texts: Mapping[str, list],
    ids: dict[str, list],
    found: Mapping[str, dict],
    encode: Mapping[str, Callable],
) -> None:
    """Leaves out rows that are too long in one stream of the group from all of them.

    Args:
        group: names of the streams.
        texts, ids: stream -> its rows, and what `matched` returned; changed in place.
        found: stream -> its settings; with long="drop" its `length` is the limit.
        encode: stream -> function from a length, or None, to its table.
    Raises:
        ValueError: if no row is short enough.
    Warns:
        UserWarning: with the number of rows removed.
    """
    limits = {
        name: found[name]["length"]
        for name in group
        if found[name].get("length") and found[name].get("long") == "drop"
    }
    if not limits:
        return
    short = np.ones(len(texts[group[0]]), bool)
    for name, limit in limits.items():
        short &= encode[name](None)["mask"].sum(1) <= limit
    if short.all():
        return
    (rows,) = np.nonzero(short)
    message = (
        f"{len(short) - len(rows)} of {len(short)} pairs of the streams "
        f"{_checks.listed(group)} have a row of more than {limits} tokens"
    )
    if not rows.size:
        raise ValueError(f"{message}, and none is left. Raise the length.")
    warnings.warn(f"{message} and were removed from all.", stacklevel=4)
    for name in group:
        texts[name][:] = [texts[name][row] for row in rows]
        ids[name] = [ids[name][row] for row in rows]
