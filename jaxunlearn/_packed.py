# SPDX-License-Identifier: Apache-2.0
"""Scoring tokens of many sequences without padding, and shared beginnings only once.

Sequences that begin with the same tokens, such as a question with several answers, form
a tree: each node is a token, and a sequence is a path from the root. Each node is
computed once. Trees are placed one after the other into rows of one width, their nodes
in depth-first order. The descendants of a node then follow it directly, so one number
for each node says who attends to it: node q attends to node k if k <= q < ends[k].
`Model.packs` says which models take such rows.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn._ahead import one_behind
from jaxunlearn.terms._chunks import values_at
from jaxunlearn.typing import Array, Batch, Model, Params, PyTree

WIDTH = 128  # of a row, if no sequence is longer
MAX_WIDTH = 512  # in wider rows attention between all tokens costs more than padding
_MULTIPLE = 8  # widths are multiples of it, so that few shapes compile
_SHARED = 4  # a sequence joins a tree if it shares one token in this many


class Packed(NamedTuple):
    """Rows of trees, and where the log-probability of each target is read.

    Attributes:
        rows: `tokens` and `positions` [R, W] int32, `mask` [R, W] bool, and `ends`
            [R, W] int32, the index in its row after a node's last descendant.
        states: [M] int, index of the node before each target, in rows laid end to end,
            in increasing order.
        targets: [M] int32, the tokens to score.
        sources: [M] int, index of each target in `where` laid out flat.
    """

    rows: dict[str, np.ndarray]
    states: np.ndarray
    targets: np.ndarray
    sources: np.ndarray


def supports(model: Model, table: Any) -> bool:
    """Whether `scores` can run the model over the table.

    It needs a model that takes rows of trees, one device, and a table of arrays whose
    sequences are short and do not change their rotary positions with their length.
    """
    if model.packs is not model.apply or not isinstance(table, Mapping):
        return False
    if "image" in table:
        return False
    if not {"tokens", "mask"} <= set(table) or not len(table["mask"]):
        return False
    if not jax.sharding.get_abstract_mesh().empty:
        return False
    mask = np.asarray(table["mask"])
    widest = getattr(model.config, "max_length", None)
    if widest is not None and mask.shape[1] > widest:
        return False  # for `apply` to refuse
    limit = getattr(model.config, "cache_limit", None)
    return mask.sum(axis=1).max() <= (
        MAX_WIDTH if limit is None else min(MAX_WIDTH, limit)
    )


def scores(
    model: Model,
    params: Params,
    table: Mapping[str, np.ndarray],
    function: Callable[[Array, Array], tuple[Array, ...]],
    *,
    batch_size: int,
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """A function of the logits before every answer token of a table.

    Args:
        model, params, table: as `supports` allows.
        function: as `terms.target_values` takes it, giving a tuple; it is compiled once
            for each function object.
        batch_size: rows of the table whose tokens, padding included, are as many as
            those of one batch.
    Returns:
        (arrays [n, L - 1], 0 where not counted; where [n, L - 1] bool).
    """
    tokens, mask = (np.asarray(table[name]) for name in ("tokens", "mask"))
    answer = np.asarray(table.get("answer", mask))
    where = (answer & mask)[:, 1:] & mask[:, :-1]
    packed = pack(tokens, mask, where, getattr(model.config, "max_length", None))
    count, width = packed.rows["tokens"].shape
    longest = -(-int(mask.sum(axis=1).max()) // _MULTIPLE) * _MULTIPLE
    size = _batch_rows(count, max(1, batch_size * longest // width))
    outs = None

    def started(start):
        batch, part = _batch(packed, start, size)
        return _scores(model, params, batch, function), part

    for values, part in one_behind(map(started, range(0, count, size))):
        values = jax.device_get(values)
        if outs is None:
            outs = [np.zeros(where.size, value.dtype) for value in values]
        for out, value in zip(outs, values, strict=True):
            out[packed.sources[part]] = value[: part.stop - part.start]
    return tuple(out.reshape(where.shape) for out in outs), where


def pack(
    tokens: np.ndarray,
    mask: np.ndarray,
    where: np.ndarray,
    max_width: int | None = None,
) -> Packed:
    """The sequences of a table as rows of trees, with as few nodes as possible.

    Tokens after the last one that predicts a target are left out.

    Args:
        tokens, mask: [n, L].
        where: [n, L - 1] bool, the targets: column t is about token t + 1 and needs
            `mask` at t.
        max_width: the widest row that the model takes.
    """
    columns = np.arange(tokens.shape[1])
    last = np.where(where.any(1), where.shape[1] - 1 - where[:, ::-1].argmax(1), -1)
    needed = mask & (columns <= last[:, None])
    lengths = needed.sum(1)
    width = max(int(lengths.max()), min(WIDTH, int(lengths.sum())), 1)
    width = -(-width // _MULTIPLE) * _MULTIPLE
    width = width if max_width is None else min(width, max_width)
    front = np.argsort(~needed, axis=1, kind="stable")[:, : max(1, lengths.max())]
    # Sequences end with -1, so that a beginning of another one comes before it.
    texts = np.where(
        np.arange(front.shape[1]) < lengths[:, None],
        np.take_along_axis(tokens, front, axis=1),
        -1,
    )
    order = np.lexsort(texts.T[::-1])
    trees, nodes, tree_of = _trees(texts[order], lengths[order], width)
    starts, count = _places([len(ends) for _, _, ends in trees], width)
    rows = {name: np.zeros(count * width, np.int32) for name in ("tokens", "positions")}
    rows["mask"] = np.zeros(count * width, np.bool_)
    # A node of padding sees itself only.
    rows["ends"] = np.tile(np.arange(1, width + 1, dtype=np.int32), count)
    for (token, position, ends), start in zip(trees, starts, strict=True):
        place = slice(start, start + len(token))
        rows["tokens"][place], rows["positions"][place] = token, position
        rows["mask"][place] = True
        rows["ends"][place] = np.asarray(ends) + start % width
    back = np.argsort(order)
    first = np.asarray([*starts, 0])[tree_of][back]
    row, column = np.nonzero(where)
    depth = needed.cumsum(1)[row, column] - 1
    states = first[row] + nodes[back][row, depth]
    sort = np.argsort(states, kind="stable")
    return Packed(
        {name: x.reshape(count, width) for name, x in rows.items()},
        states[sort],
        tokens[row, column + 1][sort].astype(np.int32),
        np.flatnonzero(where)[sort],
    )


def _trees(texts, lengths, width):
    """Trees of sequences in lexicographic order.

    Returns:
        (for each tree (token, depth, end) of its nodes in depth-first order; [n, L]
        index of the node of each token in its tree; [n] tree of each sequence, -1 for
        an empty one).
    """
    same = texts[1:] == texts[:-1]
    shared = np.where(same.all(1), same.shape[1], same.argmin(1))
    shared = np.minimum(np.concatenate([[0], shared]), lengths)
    nodes, tree_of = np.zeros(texts.shape, np.int64), np.full(len(texts), -1)
    trees: list[tuple[list[int], list[int], list[int]]] = []
    for i, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        if not length:
            continue
        if trees:
            common = min(common, lengths[i - 1])
            few = common * _SHARED < length
            large = len(trees[-1][0]) + length - common > width
        if not trees or few or large:
            trees.append(([], [], []))
            common = 0
        token, depth, ends = trees[-1]
        size = len(token)
        nodes[i, :common] = nodes[i - 1, :common]
        nodes[i, common:length] = np.arange(size, size + length - common)
        token += texts[i, common:length].tolist()
        depth += range(common, length)
        ends += [0] * (length - common)
        for node in nodes[i, :length]:  # the path is open until here
            ends[node] = len(token)
        tree_of[i] = len(trees) - 1
    return trees, nodes, tree_of


def _places(sizes, width):
    """(start of each item in rows laid end to end, number of rows): the largest first,
    each into the row with the least room that it fits in."""
    starts = np.zeros(len(sizes), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(width + 1)]  # by free tokens
    count = 0
    for item in np.argsort(-np.asarray(sizes), kind="stable"):
        size = sizes[item]
        free = next((x for x in range(size, width + 1) if rows_with[x]), None)
        if free is None:
            row, free, count = count, width, count + 1
        else:
            row = rows_with[free].pop()
        starts[item] = row * width + width - free
        rows_with[free - size].append(row)
    return starts, max(1, count)


def _batch_rows(count, most):
    """Rows in a batch: of `most`, three quarters and half of it, the one with which the
    last batch is fullest, so that tables of any size need few shapes."""
    if 2 * count <= most:
        return count
    sizes = dict.fromkeys((most, max(1, 3 * most // 4), max(1, most // 2)))
    return min(sizes, key=lambda size: -(-count // size) * size)


def _batch(packed, start, size):
    """(the arrays of one batch, the slice of the targets that it has)."""
    count, width = packed.rows["tokens"].shape
    index = np.arange(start, start + size)
    rows = {name: x[np.minimum(index, count - 1)] for name, x in packed.rows.items()}
    limits = np.searchsorted(packed.states, [start * width, (start + size) * width])
    part = slice(*limits.tolist())
    total = part.stop - part.start
    length = size * width * max(1, -(-total // (size * width)))
    states, targets = np.zeros((2, length), np.int32)
    states[:total] = packed.states[part] - start * width
    targets[:total] = packed.targets[part]
    return rows | {"states": states, "targets": targets, "count": np.int32(total)}, part


@partial(jax.jit, static_argnums=(0, 3))
def _scores(
    model: Model,
    params: Params,
    batch: Batch,
    function: Callable[[Array, Array], PyTree],
) -> PyTree:
    names = ("tokens", "mask", "positions", "ends")
    hidden = model.apply(params, {name: batch[name] for name in names}).hidden
    states = hidden.reshape(-1, hidden.shape[-1])
    found = batch["states"], batch["targets"], batch["count"]
    return values_at(model, params, states, *found, function)
