# SPDX-License-Identifier: Apache-2.0
"""One block of the decoder, and what goes into the first: embeddings and rotations."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxunlearn import sharding
from jaxunlearn.models import _attention, _rope
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import BATCH, ROWS
from jaxunlearn.typing import Array, Params, PyTree

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_WIDEST = jnp.iinfo(jnp.int32).max  # the window of a layer that sees everything


def run(config, weights, x, rotation, attend, edits, index):
    """One decoder block: (x [B, L, D], {site: value})."""
    batch, length, _ = x.shape
    attention, mlp = weights["attention"], weights["mlp"]
    read = _edit(edits, "attention_in", norm(config, attention["norm"], x), index)
    q, k, v = (
        _dense(attention[name], read).reshape(batch, length, -1, config.head_dim)
        for name in ("q", "k", "v")
    )
    if config.qk_norm:
        q = norm(config, attention["q_norm"], q)
        k = norm(config, attention["k_norm"], k)
    if rotation is not None:
        q, k = _rope.rotate(q, *rotation), _rope.rotate(k, *rotation)
    # Each part of a sequence asks its own queries, of all keys and values.
    q = sharding.constrain(q, *ROWS, "tensor", None)
    k, v = (sharding.constrain(x, BATCH, None, "tensor", None) for x in (k, v))
    mixed = attend(q, k, v).reshape(batch, length, -1)
    mixed = _edit(edits, "attention", mixed, index)
    added = _dense(attention["o"], mixed)
    if config.post_norms:
        added = norm(config, attention["post_norm"], added)
    attended = added = _edit(edits, "attention_out", added, index)
    before, x = x, x + added
    h = norm(config, mlp["norm"], before if config.parallel else x)
    h = _edit(edits, "mlp_in", h, index)
    active = _ACTIVATIONS[config.activation]
    if config.gated:
        units = active(_wide(mlp["gate"], h)) * _wide(mlp["up"], h)
    else:
        units = active(_wide(mlp["up"], h))
    units = _edit(edits, "mlp", units, index)
    added = _dense(mlp["down"], units)
    if config.post_norms:
        added = norm(config, mlp["post_norm"], added)
    added = _edit(edits, "mlp_out", added, index)
    x = sharding.constrain(x + added, *ROWS, None)
    x = _edit(edits, "block", x, index)
    values = {"attention_in": read, "attention": mixed, "attention_out": attended}
    return x, values | {"mlp_in": h, "mlp": units, "mlp_out": added, "block": x}


def attention(config: DecoderConfig, visible: Array) -> Callable[..., Array]:
    """(q, k, v) -> mixed values, for queries that see what `visible` says."""
    return partial(
        _attention.attend,
        visible=visible,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )


def norm(config: DecoderConfig, layer: Params, x: Array) -> Array:
    """The norm that the settings ask for, over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    if config.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(
        jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps
    )
    if config.norm == "rms":
        return (wide * scale).astype(x.dtype) * layer["scale"].astype(x.dtype)
    factor = layer["scale"].astype(jnp.float32)
    if config.norm == "rms_plus_one":
        return (wide * scale * (1.0 + factor)).astype(x.dtype)
    bias = layer["bias"].astype(jnp.float32)
    return (wide * scale * factor + bias).astype(x.dtype)


def embed(
    config: DecoderConfig, params: Params, tokens: Array, positions: Array
) -> Array:
    """What enters the first block, [B, L, D] in the compute dtype."""
    dtype = jnp.dtype(config.compute_dtype)
    x = params["embed"]["embedding"][tokens].astype(dtype)
    if config.embed_scale is not None:
        x = x * jnp.asarray(config.embed_scale, dtype)
    if config.rope is None:
        rows = positions + config.position_offset
        x = x + params["positions"]["embedding"][rows].astype(dtype)
    return sharding.constrain(x, *ROWS, None)


def rotations(config: DecoderConfig, positions: Array) -> PyTree:
    """(rotation of most layers, that of layers with a window or None); None without."""
    if config.rope is None:
        return None
    plain = _rope.rotations(config.rope, config.head_dim, positions)
    if config.local_rope is None:
        return plain, None
    return plain, _rope.rotations(config.local_rope, config.head_dim, positions)


def of_layer(rotations: PyTree, window: Array | None) -> PyTree:
    """The rotation of a layer with this window."""
    if rotations is None or rotations[1] is None:
        return None if rotations is None else rotations[0]
    plain, local = rotations
    return tuple(
        jnp.where(window == _WIDEST, a, b) for a, b in zip(plain, local, strict=True)
    )


def layers(config: DecoderConfig, blocks: Params, count: int) -> PyTree:
    """What the scan hands to each layer: (weights, window or None, index)."""
    windows = None
    if config.windows is not None:
        windows = jnp.array([w or _WIDEST for w in config.windows[:count]], jnp.int32)
    return blocks, windows, jnp.arange(count)


def _edit(edits, site, value, index):
    return edits[site](value, index) if site in edits else value


def _dense(layer: Params, x: Array) -> Array:
    # One axis of rows: the gradient of a product summed over two axes makes XLA copy
    # activations into transposed order on CPU, an eighth of the step at 135M. Where
    # both axes are cut they stay two, as one would have to be gathered first.
    kernel = layer["kernel"].astype(x.dtype)
    rows = x if sharding.parts_of("context") > 1 else x.reshape(-1, x.shape[-1])
    y = rows @ kernel
    if "lora_a" in layer:
        y += low_rank(layer, rows)
    y = y.reshape(*x.shape[:-1], kernel.shape[-1])
    return y + layer["bias"].astype(x.dtype) if "bias" in layer else y


def _wide(layer: Params, x: Array) -> Array:
    # Named, so that remat "mlp" can keep it.
    return checkpoint_name(_dense(layer, x), "mlp")


def low_rank(layer: Params, x: Array) -> Array:
    """What LoRA's leaves add to a product, with no array of a kernel's size."""
    return (x @ layer["lora_a"].astype(x.dtype)) @ layer["lora_b"].astype(x.dtype)
