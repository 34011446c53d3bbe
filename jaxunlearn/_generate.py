# SPDX-License-Identifier: Apache-2.0
"""Batched decoding with a key-value cache and static shapes."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Batch, Model, Params, PRNGKey

_ROUND_TO = 8  # widths of a piece are multiples of it, so that few shapes compile


def generate(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos_ids: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    key: PRNGKey | None = None,
) -> Array:
    """Continues every prompt of a batch.

    A greedy row has the tokens that it has alone. Where rotary positions depend on the
    length (`longrope`), each token is that of one pass over the text before it; with
    `dynamic` earlier tokens keep their angles, as in transformers.

    Args:
        model: a Model that can decode (has `init_cache` and `decode`).
        params: its parameters.
        batch: prompts, `tokens` [B, L] and `mask` [B, L], padded on either side; every
            row has at least one real token.
        max_new_tokens: number of tokens to add.
        eos_ids: id of the token that ends a text, or several; the rest of its row
            repeats it. Decoding stops early when every row has ended.
        temperature: 0 takes the most probable token; above 0 samples from logits /
            temperature.
        key: needed for sampling.
    Returns:
        [B, max_new_tokens] int32, only the new tokens.
    Raises:
        ValueError: if the model cannot decode, a row has no token or one outside the
            model's vocabulary, the texts would be longer than the model's maximal
            length, or sampling has no key.
    """
    _checks.positive_int("generate", max_new_tokens=max_new_tokens)
    _checks.not_negative("generate", temperature=temperature)
    if model.decode is None:
        raise ValueError(
            "generate needs a model with a key-value cache, got a model with "
            "decode=None. Use a decoder from models.make or hf.load."
        )
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate needs a key for temperature={temperature}, got key=None. Pass "
            "key=jax.random.key(...)."
        )
    longest = getattr(model.config, "max_length", None)
    total = batch["tokens"].shape[1] + max_new_tokens
    if longest is not None and total > longest:
        raise ValueError(
            f"generate needs prompt and new tokens within {longest} positions, got "
            f"{total}. Shorten the prompts or reduce max_new_tokens."
        )
    _checks.token_ids("generate", model, batch)
    if not isinstance(batch["mask"], jax.core.Tracer):
        (empty,) = np.nonzero(~np.asarray(batch["mask"]).any(axis=1))
        if empty.size:
            raise ValueError(
                f"generate needs at least one real token in every row, got none in row "
                f"{empty[0]}. Begin it with the tokenizer's begin token."
            )
    key = jax.random.key(0) if key is None else key
    params = prepare_params(model, params)
    capacity = total - 1
    pieces, back = _pieces(batch)
    starts = [_start(params, piece, model, capacity) for piece in pieces]
    lengths = None
    if _switches(model, batch, max_new_tokens):
        starts += [_start(params, piece, model, capacity, total) for piece in pieces]
        lengths = jnp.concatenate([piece["mask"].sum(axis=1) for piece in pieces])
    hidden, cache = starts[0] if len(starts) == 1 else _joined(starts)
    eos = np.asarray([] if eos_ids is None else eos_ids, np.int32).reshape(-1)
    settings = (max_new_tokens, float(temperature))
    new, _ = _continue(params, hidden, cache, eos, key, lengths, model, *settings)
    return new if back is None else new[back]


def prepare_params(model: Model, params: Params) -> Params:
    """The params in the layout that decodes fastest; on CPUs a copy of most of them.

    `generate` calls this itself. Before many calls with the same params, call it once
    to save time.
    """
    return params if model.prepare_decode is None else _prepare(params, model)


def rows_axis(leaf: Array) -> int | None:
    """The axis of a cache's leaf that indexes rows; see Model.init_cache."""
    return None if leaf.ndim == 0 else 1 if leaf.ndim == 5 else 0


def _switches(model, batch, max_new_tokens):
    """Whether a row may grow past the length where `longrope` rotates all its tokens by
    other angles. Its cache is then of no use: every row is decoded with the angles of
    short and of long sequences, and each token is taken from one of the two.

    With `dynamic` earlier tokens keep their angles, as in transformers.
    """
    limit = getattr(model.config, "cache_limit", None)
    if limit is None or model.config.rope.kind != "longrope":
        return False
    longest = batch["tokens"].shape[1] + max_new_tokens - 1
    if isinstance(batch["mask"], jax.core.Tracer):
        return longest > limit
    lengths = np.asarray(batch["mask"]).sum(axis=1)
    return bool(np.any((lengths <= limit) & (lengths + max_new_tokens - 1 > limit)))


def _pieces(batch):
    """The batch split into batches of rows of similar length, each with less padding.

    Returns:
        (batches, index that restores the order of the rows, or None). It is the one
        unchanged batch where little padding would be saved, under jit and on a mesh.
    """
    unsplit = {name: jnp.asarray(batch[name]) for name in ("tokens", "mask")}
    traced = any(isinstance(x, jax.core.Tracer) for x in unsplit.values())
    if traced or not jax.sharding.get_abstract_mesh().empty:
        return [unsplit], None
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
        return [unsplit], None
    # Real tokens first, so that the columns beyond `width` hold only padding.
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
def _prepare(params, model):
    return model.prepare_decode(params)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _start(params, batch, model, capacity, min_length=None):
    """The last hidden state of each prompt, [B, D], and the cache after the prompts."""
    rows, length = batch["tokens"].shape
    settings = {} if min_length is None else {"min_length": min_length}
    cache = model.init_cache(rows, capacity, **settings)
    hidden, cache = model.decode(params, batch, cache)
    last = jnp.max(jnp.where(batch["mask"], jnp.arange(length), 0), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


@jax.jit
def _joined(starts):
    """The results of `_start` for several batches as those of one batch."""

    def join(*leaves):
        axis = rows_axis(leaves[0])
        if axis is None:  # new tokens are appended after the longest prompt
            return jnp.max(jnp.stack(leaves))
        return jnp.concatenate(leaves, axis=axis)

    return jax.tree.map(join, *starts)


@partial(jax.jit, static_argnums=(6, 7, 8), donate_argnums=2)
def _continue(params, hidden, cache, eos_ids, key, lengths, model, count, temperature):
    """(new tokens [B, count], the cache: only a returned cache can be donated).

    With `lengths` [B], tokens of each prompt, `hidden` and `cache` have every row
    twice: with the angles of short sequences, and of long ones.
    """
    rows = hidden.shape[0] if lengths is None else len(lengths)

    def choose(hidden, index):
        if lengths is not None:
            short, long = jnp.split(hidden, 2)
            passed = lengths + index > model.config.cache_limit
            hidden = jnp.where(passed[:, None], long, short)
        logits = model.unembed(params, hidden)
        if temperature == 0:
            return _argmax(logits)
        token_key = jax.random.fold_in(key, index)
        return jax.random.categorical(token_key, logits / temperature).astype(jnp.int32)

    def ends(token):
        return jnp.any(token[:, None] == eos_ids, axis=1)

    def unfinished(state):
        index, _, _, done, _ = state
        return (index < count) & ~jnp.all(done)

    def add(state):
        index, token, cache, done, out = state
        tokens = jnp.tile(token[:, None], (1 if lengths is None else 2, 1))
        new = {"tokens": tokens, "mask": jnp.ones(tokens.shape, jnp.bool_)}
        hidden, cache = model.decode(params, new, cache)
        token = jnp.where(done, token, choose(hidden[:, 0], index))
        done = done | ends(token)
        return index + 1, token, cache, done, out.at[:, index].set(token)

    token = choose(hidden, 0)
    out = jnp.zeros((rows, count), jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, cache, ends(token), out)
    index, token, cache, _, out = jax.lax.while_loop(unfinished, add, state)
    return jnp.where(jnp.arange(count) < index, out, token[:, None]), cache


def _argmax(logits):
    """argmax over the last axis, [B], in two passes: jnp.argmax is not vectorised on
    CPUs and took a tenth of a small model's step."""
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    index = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(index, axis=-1)
