# SPDX-License-Identifier: Apache-2.0
"""Batched decoding with a key-value cache and static shapes."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Batch, Model, Params, PRNGKey


def generate(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    max_new_tokens: int,
    end: int | None = None,
    temperature: float = 0.0,
    rng: PRNGKey | None = None,
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
        rng: needed for sampling.
    Returns:
        [B, max_new_tokens] int32, the new tokens only.
    Raises:
        ValueError: if the model cannot decode, the texts would be longer than its
            positions, or sampling lacks an rng.
    """
    _checks.positive_int("generate", max_new_tokens=max_new_tokens)
    _checks.not_negative("generate", temperature=temperature)
    if model.extend is None:
        raise ValueError(
            "generate needs a model with a key-value cache, got one without `extend`. "
            "Use a decoder from models.make or hf.load."
        )
    if temperature > 0 and rng is None:
        raise ValueError("generate needs rng=jax.random.key(...) to sample, got none.")
    longest = getattr(model.config, "longest", None)
    total = batch["tokens"].shape[1] + max_new_tokens
    if longest is not None and total > longest:
        raise ValueError(
            f"generate needs prompt and new tokens within {longest} positions, got "
            f"{total}. Shorten the prompts or ask for fewer tokens."
        )
    rng = jax.random.key(0) if rng is None else rng
    inputs = {
        "tokens": jnp.asarray(batch["tokens"]),
        "mask": jnp.asarray(batch["mask"]),
    }
    stop = -1 if end is None else int(end)
    return _generate(
        params, inputs, stop, rng, model, max_new_tokens, float(temperature)
    )


@partial(jax.jit, static_argnums=(4, 5, 6))
def _generate(params, batch, end, rng, model, count, temperature):
    rows, length = batch["tokens"].shape
    mask = batch["mask"]
    hidden, cache = model.extend(params, batch, model.cache(rows, length + count - 1))
    last = jnp.max(jnp.where(mask, jnp.arange(length), 0), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

    def choose(hidden, index):
        logits = model.unembed(params, hidden)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        key = jax.random.fold_in(rng, index)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def going(state):
        index, _, _, done, _ = state
        return (index < count) & ~jnp.all(done)

    def add(state):
        index, token, cache, done, out = state
        new = {"tokens": token[:, None], "mask": jnp.ones((rows, 1), jnp.bool_)}
        hidden, cache = model.extend(params, new, cache)
        token = jnp.where(done, end, choose(hidden[:, 0], index))
        done = done | (token == end)
        return index + 1, token, cache, done, out.at[:, index].set(token)

    token = choose(hidden, 0)
    out = jnp.full((rows, count), end, jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, cache, token == end, out)
    return jax.lax.while_loop(going, add, state)[-1]
