# SPDX-License-Identifier: Apache-2.0
"""Functions of the logits, such as log-probabilities of targets, a few tokens at a
time."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, losses, sharding
from jaxunlearn.typing import Array, Batch, Model, Params, PyTree

_MAX_LOGITS = 2**28  # of one chunk on one device of a mesh: 1 GiB in float32
_MIN_TOKENS = 32  # of each row in a chunk
_MIN_ALL_TOKENS = 256  # of all rows together in a chunk: see chunk_size
_COUNTED = 512  # tokens in a chunk of counted_values


def target_logps(
    model: Model, params: Params, batch: Batch, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probability of every answer token given the tokens before it.

    Args:
        model: the model.
        params: its parameters.
        batch: `tokens`, `mask` and optionally `answer`, each [B, L].
        chunk: tokens of each sequence unembedded at a time, >= 1: a chunk of logits is
            [B, chunk, V] float32. The default is 32, or 256 over all rows where that is
            more, and at most half of the sequence. Where rows are split over devices it
            is as many as give a device 2^28 logits.
    Returns:
        (logps [B, L - 1] float32 nats, 0 where not counted; where [B, L - 1] bool);
        column t belongs to token t + 1. The first real token has no token before it and
        never counts.
    """
    hidden = model.apply(params, batch).hidden
    return logps_of(model, params, hidden, batch, chunk)


def target_values(
    model: Model,
    params: Params,
    batch: Batch,
    function: Callable[[Array, Array], PyTree],
    *,
    chunk: int | None = None,
) -> tuple[PyTree, Array]:
    """A function of the logits before every answer token.

    Args:
        model, params, batch, chunk: as `target_logps`.
        function: (logits [B, n, V], targets [B, n]) -> a tree of arrays [B, n], such
            as metrics.greedy_hits; several values in one tree share a forward pass.
    Returns:
        (the tree of [B, L - 1], undefined where not counted; where [B, L - 1] bool),
        columns as in `target_logps`.
    """
    hidden = model.apply(params, batch).hidden
    targets, where = aligned(batch)

    def piece(hidden, targets, where):
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
        return function(model.unembed(params, hidden), targets)

    chunk = chunk_size(model, params, hidden) if chunk is None else chunk
    return in_chunks(piece, chunk, hidden, targets, where), where[:, :-1]


def counted_values(
    model: Model,
    params: Params,
    batch: Batch,
    function: Callable[[Array, Array], PyTree],
) -> tuple[PyTree, Array]:
    """`target_values` that unembeds only the tokens that count; forward only.

    Questions and padding are often more than half of the tokens, and with a large
    vocabulary their logits cost as much as many layers. The tokens of all rows are
    gathered, so the rows must not be split over a mesh. The length of the loop depends
    on the masks, so it has no gradient.

    Args:
        model, params, batch: as `target_logps`.
        function: as `target_values`; B is 1 in its arguments.
    Returns:
        As `target_values`.
    """
    hidden = model.apply(params, batch).hidden
    targets, where = aligned(batch)
    shape, counts = where.shape, where.reshape(-1)
    order = jnp.argsort(~counts, stable=True)
    states = hidden.reshape(-1, hidden.shape[-1])
    targets = jnp.where(where, targets, jnp.zeros_like(targets)).reshape(-1)[order]
    total = jnp.sum(counts, dtype=jnp.int32)
    found = values_at(model, params, states, order, targets, total, function)
    found = jax.tree.map(
        lambda x: jnp.zeros_like(x).at[order].set(x).reshape(shape)[:, :-1], found
    )
    return found, where[:, :-1]


def values_at(
    model: Model,
    params: Params,
    states: Array,
    index: Array,
    targets: Array,
    count: Array,
    function: Callable[[Array, Array], PyTree],
) -> PyTree:
    """A function of the logits of some hidden states, a few at a time; forward only.

    Args:
        model, params: as `target_logps`.
        states: [T, D], after the final norm.
        index: [M] int32, the state of each value.
        targets: [M] int32, the target of each value.
        count: int32 scalar, how many of the M values are wanted, the first ones; work
            is done for these only.
        function: as `target_values`; B is 1 in its arguments.
    Returns:
        The tree of [M]; values beyond the first `count` are undefined.
    """
    total = index.shape[0]
    size = min(_COUNTED, total)
    index, targets = (jnp.pad(x, (0, -total % size)) for x in (index, targets))

    def piece(start):
        one, two = (
            jax.lax.dynamic_slice(x, (start,), (size,)) for x in (index, targets)
        )
        return function(model.unembed(params, states[one][None]), two[None])

    def add(number, out):
        start = number * size
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice(x, new[0], (start,)),
            out,
            piece(start),
        )

    like = jax.eval_shape(piece, jnp.int32(0))
    out = jax.tree.map(lambda x: jnp.zeros(index.shape, x.dtype), like)
    out = jax.lax.fori_loop(0, -(-count // size), add, out)
    return jax.tree.map(lambda x: x[:total], out)


def logps_of(model, params, hidden, batch, chunk):
    """`target_logps` of hidden states that were already computed."""
    targets, where = aligned(batch)

    def piece(hidden, targets, where):
        # Masking the states is far cheaper than masking their logits, and removes NaN
        # of masked tokens from the value and the gradient equally well.
        hidden = jnp.where(where[..., None], hidden, jnp.zeros_like(hidden))
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
        if fused:
            logps = model.target_logps(params, hidden, targets)
        else:
            logps = losses.token_logps(model.unembed(params, hidden), targets)
        return jnp.where(where, logps, 0.0)

    fused = model.target_logps is not None and chunk is None
    if fused:  # without logits there is no reason for chunks
        return piece(hidden, targets, where)[:, :-1], where[:, :-1]
    chunk = chunk_size(model, params, hidden) if chunk is None else chunk
    return in_chunks(piece, chunk, hidden, targets, where), where[:, :-1]


def aligned(batch: Batch) -> tuple[Array, Array]:
    """Targets [B, L] (the token after each) and which of them count; the last counts
    never. The length stays L, so that a mesh which divides L divides these too."""
    mask = batch["mask"]
    counted = batch.get("answer", mask) & mask
    targets, counted = (jnp.roll(x, -1, axis=1) for x in (batch["tokens"], counted))
    return targets, (counted & mask).at[:, -1].set(False)


def chunk_size(model: Model, params: Params, hidden: Array) -> int:
    """Default number of tokens of each sequence unembedded at a time; see
    `target_logps`.

    Each chunk reads the unembedding's kernel and adds to its gradient, so small chunks
    are slow: on two cores BLUR on SmolLM2-135M took about 6 % longer with 128 tokens a
    chunk, over all rows, than with 256. On a mesh every chunk gathers that kernel and
    reduces its gradient over devices; with 32 tokens of each row a chunk, that was 24
    times all other traffic of a step of four layers of the width of an 8B model.
    """
    length = hidden.shape[1] - 1
    smallest = max(_MIN_TOKENS, _MIN_ALL_TOKENS // hidden.shape[0])
    smallest = max(1, min(smallest, -(-length // 2)))
    rows = math.prod(sharding.parts_of(axis) for axis in sharding.BATCH)
    if rows == 1:
        return smallest
    one = jax.eval_shape(model.unembed, params, hidden[:, :1])
    parts = rows * sharding.parts_of("tensor")
    return max(smallest, min(length, _MAX_LOGITS * parts // max(1, one.size)))


def in_chunks(function, chunk, *arrays):
    """The function mapped over pieces of axis 1 of the arrays [B, L, ...]: [B, L - 1].

    The last token has no target and is left out. Axis 0 is not split, so that it can
    stay sharded over data-parallel devices; with flattened tokens every device would
    get all rows of a chunk. For the same reason a chunk takes every n-th token, a few
    from each part of a sequence that is sharded over context.
    """
    batch, length = arrays[0].shape[0], arrays[0].shape[1] - 1
    _checks.positive_int("A term", chunk=chunk)
    parts = sharding.parts_of("context")
    chunk = -(-chunk // parts) * parts
    pieces = -(-length // chunk)
    padded = pieces * chunk

    def cut(x):
        short = max(0, padded - x.shape[1])
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))[:, :padded]
        return jnp.moveaxis(x.reshape(batch, chunk, pieces, *x.shape[2:]), 2, 0)

    cuts = jax.tree.map(cut, arrays)
    values = jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), cuts)

    def joined(x):
        return jnp.moveaxis(x, 0, 2).reshape(batch, padded)[:, :length]

    return jax.tree.map(joined, values)
