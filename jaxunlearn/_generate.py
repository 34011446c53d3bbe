# SPDX-License-Identifier: Apache-2.0
"""Batched decoding with a key-value cache and static shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Batch, Model, Params, PRNGKey

_ROUND_TO = 8  # widths of a piece, so that few shapes are compiled


def generate(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    max_new_tokens: int,
    end: int | None = None,
    temperature: float = 0.0,
    key: PRNGKey | None = None,
) -> Array:
    """Continues every prompt of a batch.

    Args:
        model: a Model that can decode (has `cache` and `extend`).
        params: its parameters.
        batch: prompts, `tokens` [B, L] and `mask` [B, L], padded on either side; every
            row has at least one real token.
        max_new_tokens: how many tokens to add.
        end: id of the token that ends a text; the rest of its row is `end`. Decoding
            stops early when every row has ended.
        temperature: 0 takes the likeliest token, above 0 samples from logits /
            temperature.
        key: needed for sampling.
    Returns:
        [B, max_new_tokens] int32, the new tokens only.
    Raises:
        ValueError: if the model cannot decode, the texts would be longer than its
            positions, or sampling lacks an key.
    """
    _checks.positive_int("generate", max_new_tokens=max_new_tokens)
    _checks.not_negative("generate", temperature=temperature)
    if model.decode is None:
        raise ValueError(
            "generate needs a model with a key-value cache, got one without `extend`. "
            "Use a decoder from models.make or hf.load."
        )
    if temperature > 0 and key is None:
        raise ValueError("generate needs key=jax.random.key(...) to sample, got none.")
    longest = getattr(model.config, "max_length", None)
    total = batch["tokens"].shape[1] + max_new_tokens
    if longest is not None and total > longest:
        raise ValueError(
            f"generate needs prompt and new tokens within {longest} positions, got "
            f"{total}. Shorten the prompts or ask for fewer tokens."
        )
    key = jax.random.key(0) if key is None else key
    params = ready(model, params)
    room = total - 1
    pieces, back = _pieces(batch)
    starts = [_start(params, piece, model, room) for piece in pieces]
    hidden, cache = starts[0] if len(starts) == 1 else _joined(starts)
    stop = -1 if end is None else int(end)
    new, _ = _continue(
        params, hidden, cache, stop, key, model, max_new_tokens, float(temperature)
    )
    return new if back is None else new[back]


def ready(model: Model, params: Params) -> Params:
    """The params as `generate` reads them fastest; on CPUs a copy of most of them.

    `generate` does this by itself; who calls it often with the same params saves time
    by doing it once.
    """
    return params if model.prepare_decode is None else _ready(params, model)


def rows_axis(leaf: Array) -> int | None:
    """The axis of a cache's leaf that has the rows: see Model.init_cache."""
    return None if leaf.ndim == 0 else 1 if leaf.ndim == 5 else 0


def _pieces(batch):
    """The batch in runs of rows of like length, each only as wide as they are.

    Returns:
        (batches, index that brings the rows back into order or None). One batch, as it
        was, where little padding would be saved, under jit and on a mesh.
    """
    whole = {name: jnp.asarray(batch[name]) for name in ("tokens", "mask")}
    traced = any(isinstance(x, jax.core.Tracer) for x in whole.values())
    if traced or not jax.sharding.get_abstract_mesh().empty:
        return [whole], None
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
    rows, length = tokens.shape
    lengths = mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    best, cost = [order], rows * length
    for count in (2, 4):
        if rows < 8 * count:
            break
        cuts = np.array_split(order, count)
        widths = [_width(lengths[cut].max(), length) for cut in cuts]
        spent = sum(len(cut) * width for cut, width in zip(cuts, widths, strict=True))
        if spent < 0.85 * cost:
            best, cost = cuts, spent
    if len(best) == 1:
        return [whole], None
    # Real tokens first: a row's place in its piece is then that of its tokens.
    first = np.argsort(~mask, axis=1, kind="stable")
    tokens, mask = (np.take_along_axis(x, first, axis=1) for x in (tokens, mask))
    pieces = []
    for cut in best:
        width = _width(lengths[cut].max(), length)
        columns = {"tokens": tokens[cut, :width], "mask": mask[cut, :width]}
        pieces.append({name: jnp.asarray(x) for name, x in columns.items()})
    return pieces, np.argsort(order)


def _width(longest, length):
    return int(min(length, -(-longest // _ROUND_TO) * _ROUND_TO))


@partial(jax.jit, static_argnums=1)
def _ready(params, model):
    return model.prepare_decode(params)


@partial(jax.jit, static_argnums=(2, 3))
def _start(params, batch, model, room):
    """The last hidden state of each prompt, [B, D], and the cache after the prompts."""
    rows, length = batch["tokens"].shape
    hidden, cache = model.decode(params, batch, model.init_cache(rows, room))
    last = jnp.max(jnp.where(batch["mask"], jnp.arange(length), 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


@jax.jit
def _joined(starts):
    """What `_start` says of several batches, as of one with all their rows."""

    def join(*leaves):
        axis = rows_axis(leaves[0])
        if axis is None:  # new tokens go behind the longest prompt
            return jnp.max(jnp.stack(leaves))
        return jnp.concatenate(leaves, axis=axis)

    return jax.tree.map(join, *starts)


@partial(jax.jit, static_argnums=(5, 6, 7), donate_argnums=2)
def _continue(params, hidden, cache, end, key, model, count, temperature):
    """(new tokens [B, count], the cache, as it could not be donated otherwise)."""
    rows = hidden.shape[0]

    def choose(hidden, index):
        logits = model.unembed(params, hidden)
        if temperature == 0:
            return _likeliest(logits)
        token_key = jax.random.fold_in(key, index)
        return jax.random.categorical(token_key, logits / temperature).astype(jnp.int32)

    def going(state):
        index, _, _, done, _ = state
        return (index < count) & ~jnp.all(done)

    def add(state):
        index, token, cache, done, out = state
        new = {"tokens": token[:, None], "mask": jnp.ones((rows, 1), jnp.bool_)}
        hidden, cache = model.decode(params, new, cache)
        token = jnp.where(done, end, choose(hidden[:, 0], index))
        done = done | (token == end)
        return index + 1, token, cache, done, out.at[:, index].set(token)

    token = choose(hidden, 0)
    out = jnp.full((rows, count), end, jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, cache, token == end, out)
    _, _, cache, _, out = jax.lax.while_loop(going, add, state)
    return out, cache


def _likeliest(logits):
    """argmax over the last axis, [B]. In two passes, as CPUs run jnp.argmax one number
    after the other: a tenth of a small model's step."""
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(index, axis=-1)
