# SPDX-License-Identifier: Apache-2.0
"""The decoder's key-value cache: an empty one, and running tokens onto its end."""

import jax
import jax.numpy as jnp

from jaxunlearn.models import _block
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.typing import Array, Batch, Params, PyTree


def empty(config: DecoderConfig, batch_size: int, length: int) -> PyTree:
    """A key-value cache with room for `length` tokens of `batch_size` sequences."""
    shape = (config.layers, batch_size, length, config.kv_heads, config.head_dim)
    dtype = jnp.dtype(config.compute_dtype)
    return {
        "keys": jnp.zeros(shape, dtype),
        "values": jnp.zeros(shape, dtype),
        "mask": jnp.zeros((batch_size, length), jnp.bool_),
        "positions": jnp.zeros((batch_size, length), jnp.int32),
        "used": jnp.int32(0),
    }


def extend(
    config: DecoderConfig, params: Params, batch: Batch, cache: PyTree
) -> tuple[Array, PyTree]:
    """Appends the batch's tokens to the cache and returns their hidden states.

    Args:
        config: the model.
        params: tree as `shapes` gives it.
        batch: `tokens` [B, T] int32 and `mask` [B, T] bool, a prompt or the next token.
        cache: from `empty` or an earlier call. The caller keeps used + T <=
            length.
    Returns:
        (hidden [B, T, D] final normed, the longer cache).
    """
    tokens, mask = batch["tokens"], batch["mask"]
    start = cache["used"]
    before = jnp.sum(cache["mask"], axis=1, keepdims=True, dtype=jnp.int32)
    positions = before + jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rotations = _block.rotations(config, positions)
    all_mask = jax.lax.dynamic_update_slice(cache["mask"], mask, (0, start))
    all_positions = jax.lax.dynamic_update_slice(
        cache["positions"], positions, (0, start)
    )
    slot = jnp.arange(all_mask.shape[1])
    query = start + jnp.arange(tokens.shape[1])
    sees = (slot[None, :] <= query[:, None])[None] & all_mask[:, None, :]
    distance = positions[:, :, None] - all_positions[:, None, :]

    def body(x, layer):
        (weights, window, index), keys, values = layer
        visible = sees if window is None else sees & (distance < window)

        def attend(q, k, v):
            nonlocal keys, values
            keys = jax.lax.dynamic_update_slice(keys, k, (0, start, 0, 0))
            values = jax.lax.dynamic_update_slice(values, v, (0, start, 0, 0))
            return _block.attention(config, visible)(q, keys, values)

        rotation = _block.of_layer(rotations, window)
        x, _ = _block.run(config, weights, x, rotation, attend, {}, index)
        return x, (keys, values)

    layers = _block.layers(config, params["blocks"], config.layers)
    x = _block.embed(config, params, tokens, positions)
    x, (keys, values) = jax.lax.scan(body, x, (layers, cache["keys"], cache["values"]))
    cache = {
        "keys": keys,
        "values": values,
        "mask": all_mask,
        "positions": all_positions,
        "used": start + tokens.shape[1],
    }
    return _block.norm(config, params["final_norm"], x), cache
