# SPDX-License-Identifier: Apache-2.0
"""The decoder's key-value cache: creating one, and appending tokens to it."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxunlearn import sharding
from jaxunlearn.models import _block
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.typing import Array, Batch, Params, PyTree

_CAST = ("kernel", "lora_a", "lora_b")  # leaves that are cast to the compute dtype


def empty(
    config: DecoderConfig, batch_size: int, length: int, *, min_length: int = 0
) -> PyTree:
    """A key-value cache with room for `length` tokens of `batch_size` sequences.

    Where rotary positions depend on the length of a sequence (`dynamic`, `longrope`),
    tokens are rotated as those of a sequence with all tokens so far, and at least
    `min_length` tokens. Earlier tokens keep their rotation.

    Keys and values are [B, K, length, head_dim], the layout of attention's products. On
    CPUs each layer has its array, so that a token is written in place and nothing else
    is copied; elsewhere all layers are stacked, [N, ...], and scanned. On a mesh rows
    are sharded over data and fsdp, heads over tensor.
    """
    axes = (sharding.BATCH, "tensor")
    shape = (batch_size, config.kv_heads, length, config.head_dim)
    dtype, num_layers = jnp.dtype(config.compute_dtype), config.layers

    def zeros():
        if sharding.platform() == "cpu":
            layers = (jnp.zeros(shape, dtype) for _ in range(num_layers))
            return tuple(sharding.constrain(x, *axes) for x in layers)
        return sharding.constrain(jnp.zeros((num_layers, *shape), dtype), None, *axes)

    by_length = config.cache_limit is not None
    least = jnp.full((batch_size,), min_length, jnp.int32)
    return ({"min_length": least} if by_length else {}) | {
        "keys": zeros(),
        "values": zeros(),
        "mask": jnp.zeros((batch_size, length), jnp.bool_),
        "positions": jnp.zeros((batch_size, length), jnp.int32),
        "used": jnp.int32(0),
    }


def prepare_decode(config: DecoderConfig, params: Params) -> Params:
    """The params in the layout that `decode` reads fastest, for a loop over tokens.

    On CPUs `blocks` becomes a tuple with a copy of each layer's weights. Otherwise XLA
    would copy every layer out of the stack for every token. Kernels are cast to the
    compute dtype there, as every product does, so that a loop reads half of the bytes
    in bfloat16 and casts nothing. A tied embedding is cast for the logits only, as the
    leaf `embed/unembedding`.
    """
    if sharding.platform() != "cpu" or isinstance(params["blocks"], tuple):
        return params
    dtype = jnp.dtype(config.compute_dtype)

    def ready(path, leaf):
        return leaf.astype(dtype) if path[-1].key in _CAST else leaf

    params = jax.tree_util.tree_map_with_path(ready, params)
    embed = params["embed"]
    if config.tied and dtype != embed["embedding"].dtype:
        both = embed | {"unembedding": embed["embedding"].astype(dtype)}
        params = params | {"embed": both}
    return params | {"blocks": _layers(config, params["blocks"])}


def _layers(config, blocks):
    """The stacked leaves of all layers as a tuple with those of each."""
    return tuple(
        jax.tree.map(lambda leaf, index=index: leaf[index], blocks)
        for index in range(config.layers)
    )


def decode(
    config: DecoderConfig,
    params: Params,
    batch: Batch,
    cache: PyTree,
    *,
    edits: Mapping[str, Callable[[Array, Array], Array]] | None = None,
) -> tuple[Array, PyTree]:
    """Appends the batch's tokens to the cache and returns their hidden states.

    Args:
        config: the model.
        params: from `decoder.init` or `prepare_decode`.
        batch: `tokens` [B, T] int32 and `mask` [B, T] bool, a prompt or the next token.
        cache: from `empty` or an earlier call. The caller ensures used + T <= length,
            which is not checked.
        edits: as for the decoder's `apply`.
    Returns:
        (hidden [B, T, D] after the final norm, the cache with the new tokens).
    """
    tokens, mask = batch["tokens"], batch["mask"]
    start = cache["used"]
    before = jnp.sum(cache["mask"], axis=1, keepdims=True, dtype=jnp.int32)
    positions = before + jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rotations = _block.rotations(config, positions, cache.get("min_length"))
    all_mask = jax.lax.dynamic_update_slice(cache["mask"], mask, (0, start))
    all_positions = jax.lax.dynamic_update_slice(
        cache["positions"], positions, (0, start)
    )
    slot = jnp.arange(all_mask.shape[1])
    query = start + jnp.arange(tokens.shape[1])
    sees = (slot[None, :] <= query[:, None])[None] & all_mask[:, None, :]
    distance = positions[:, :, None] - all_positions[:, None, :]

    def body(x, layer):
        (weights, window, rotates, index), keys, values = layer
        visible = sees if window is None else sees & (distance < window)

        def attend(q, k, v):
            nonlocal keys, values
            at = (0, 0, start, 0)
            keys = jax.lax.dynamic_update_slice(keys, jnp.swapaxes(k, 1, 2), at)
            values = jax.lax.dynamic_update_slice(values, jnp.swapaxes(v, 1, 2), at)
            swapped = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
            return _block.attention(config, visible)(q, *swapped)

        rotation = _block.layer_rotation(rotations, window, rotates)
        x, _ = _block.run(config, weights, x, rotation, attend, edits or {}, index)
        return x, (keys, values)

    x = _block.embed(config, params, tokens, positions)
    keys, values, blocks = cache["keys"], cache["values"], params["blocks"]
    if isinstance(keys, tuple):
        x, keys, values = _unrolled(config, body, x, blocks, keys, values)
    else:
        layers = _block.scan_inputs(config, blocks, config.layers)
        x, (keys, values) = jax.lax.scan(body, x, (layers, keys, values))
    cache = cache | {
        "keys": keys,
        "values": values,
        "mask": all_mask,
        "positions": all_positions,
        "used": start + tokens.shape[1],
    }
    x = _block.norm(config, params.get("final_norm"), x)
    return x.astype(jnp.dtype(config.compute_dtype)), cache


def _unrolled(config, body, x, blocks, keys, values):
    """Like `lax.scan` of the body, over layers in separate arrays."""
    if not isinstance(blocks, tuple):
        blocks = _layers(config, blocks)
    _, *others = _block.scan_inputs(config, None, config.layers)
    caches = []
    for i, (block, k, v) in enumerate(zip(blocks, keys, values, strict=True)):
        settings = (None if each is None else each[i] for each in others)
        x, cached = body(x, ((block, *settings), k, v))
        caches.append(cached)
    return x, *zip(*caches, strict=True)
