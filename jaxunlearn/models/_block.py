# SPDX-License-Identifier: Apache-2.0
"""One block of the decoder, and the input of the first: embeddings and rotations."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxunlearn import sharding
from jaxunlearn.models import _attention, _experts, _matmul, _rope
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import BATCH, ROWS
from jaxunlearn.typing import Array, Params, PyTree

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_NO_WINDOW = jnp.iinfo(jnp.int32).max  # of a layer that attends to all tokens


def run(config, weights, x, rotation, attend, edits, index, mask=None):
    """One decoder block: (its output [B, L, D], {site: value}).

    With experts and a mask [B, L] the values have `routing` too, an _experts.Routing.
    """
    batch, length, _ = x.shape
    attention, mlp = weights["attention"], weights["mlp"]
    dtype = jnp.dtype(config.compute_dtype)
    normed = norm(config, attention.get("norm"), x) if config.pre_norms else x
    attention_in = _edit(edits, "attention_in", normed, index)

    def heads(name):
        y = _dense(attention[name], attention_in, dtype)
        if config.qk_norm and config.qk_norm_over == "all" and name != "v":
            y = norm(config, attention.get(f"{name}_norm"), y)
        if config.qkv_clip is not None:
            y = jnp.clip(y, -config.qkv_clip, config.qkv_clip)
        return y.reshape(batch, length, -1, config.head_dim)

    q, k, v = (heads(name) for name in ("q", "k", "v"))
    if config.qk_norm and config.qk_norm_over == "head":
        q = norm(config, attention.get("q_norm"), q)
        k = norm(config, attention.get("k_norm"), k)
    if rotation is not None:
        neighbours = config.rope.interleaved
        q, k = (_rope.rotate(x, *rotation, interleaved=neighbours) for x in (q, k))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    # On the mesh axis `context` queries are sharded, keys and values are gathered.
    q = sharding.constrain(q, *ROWS, "tensor", None)
    k, v = (sharding.constrain(x, BATCH, None, "tensor", None) for x in (k, v))
    mixed = attend(q, k, v).reshape(batch, length, -1)
    mixed = _edit(edits, "attention", mixed, index)
    attention_out = _dense(attention["o"], mixed.astype(x.dtype), dtype)
    if config.post_norms:
        attention_out = norm(config, attention.get("post_norm"), attention_out)
    if config.residual_scale is not None:
        attention_out = attention_out * jnp.asarray(config.residual_scale, x.dtype)
    attention_out = _edit(edits, "attention_out", attention_out, index)
    before, x = x, x + attention_out
    if not config.shared_norm:
        normed = before if config.parallel else x
        normed = norm(config, mlp.get("norm"), normed) if config.pre_norms else normed
    mlp_in = _edit(edits, "mlp_in", normed, index)
    if config.experts is None:
        units = _edit(edits, "mlp", _units(config, mlp, mlp_in), index)
        mlp_out, values = _dense(mlp["down"], units, dtype), {"mlp": units}
    else:
        mlp_out, values = _mixture(config, mlp, mlp_in, edits, index, mask)
    if config.post_norms:
        mlp_out = norm(config, mlp.get("post_norm"), mlp_out)
    if config.residual_scale is not None:
        mlp_out = mlp_out * jnp.asarray(config.residual_scale, x.dtype)
    mlp_out = _edit(edits, "mlp_out", mlp_out, index)
    x = sharding.constrain(x + mlp_out, *ROWS, None)
    x = _edit(edits, "block", x, index)
    return x, {
        "attention_in": attention_in,
        "attention": mixed,
        "attention_out": attention_out,
        "mlp_in": mlp_in,
        **values,
        "mlp_out": mlp_out,
        "block": x,
    }


def _units(config, mlp, x):
    """The hidden units of an MLP, [B, L, F]."""
    activation = _ACTIVATIONS[config.activation]
    dtype = jnp.dtype(config.compute_dtype)
    if config.gated:
        return activation(_wide(mlp["gate"], x, dtype)) * _wide(mlp["up"], x, dtype)
    return activation(_wide(mlp["up"], x, dtype))


def _mixture(config, mlp, x, edits, index, mask):
    """The output of a mixture of experts, [B, L, D], and {site: value}."""
    dtype, wide = jnp.dtype(config.compute_dtype), x.dtype
    x = x.astype(dtype)
    logits = _experts.router_logits(mlp["router"], x)
    logits = _edit(edits, "router", logits, index)
    probs, weights, chosen = _experts.choose(config.experts, logits)
    each = _experts.spread(weights, chosen, config.experts.num)
    if "experts" in edits:
        each = _edit(edits, "experts", each, index)
        weights = jnp.take_along_axis(each, chosen, axis=-1)
    activation = _ACTIVATIONS[config.activation]
    out = _experts.run(mlp["experts"], x, weights, chosen, activation)
    if "shared" in mlp:
        units = _units(config, mlp["shared"], x)
        shared = _dense(mlp["shared"]["down"], units, dtype)
        out += jax.nn.sigmoid(_dense(mlp["shared_gate"], x, dtype)) * shared
    values = {"router": logits, "experts": each}
    if mask is not None:
        values["routing"] = _experts.routing(probs, chosen, mask)
    return out.astype(wide), values


def attention(config: DecoderConfig, visible: Array) -> Callable[..., Array]:
    """(q, k, v) -> mixed values, where queries attend to `visible` [B, L, S] bool."""
    return partial(
        _attention.attend,
        visible=visible,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )


def norm(config: DecoderConfig, layer: Params | None, x: Array) -> Array:
    """The norm that `config` names, over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    if config.norm.startswith("layer"):
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(
        jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps
    )
    if config.norm == "layer_unscaled":
        return (wide * scale).astype(x.dtype)
    if config.norm == "rms":
        return (wide * scale).astype(x.dtype) * layer["scale"].astype(x.dtype)
    factor = layer["scale"].astype(jnp.float32)
    if config.norm == "rms_plus_one":
        return (wide * scale * (1.0 + factor)).astype(x.dtype)
    bias = layer["bias"].astype(jnp.float32)
    return (wide * scale * factor + bias).astype(x.dtype)


def embed(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    mask: Array | None = None,
) -> Array:
    """The input of the first block, [B, L, D] in the dtype of activations.

    With a mask [B, L] it is NaN for real tokens outside the vocabulary, which a
    compiled program cannot refuse.
    """
    dtype = _matmul.activations(jnp.dtype(config.compute_dtype))
    x = params["embed"]["embedding"][tokens].astype(dtype)
    if mask is not None:
        outside = mask & ((tokens < 0) | (tokens >= config.vocab))
        x = x + jnp.where(outside, jnp.nan, 0.0).astype(dtype)[..., None]
    if config.embed_scale is not None:
        x = x * jnp.asarray(config.embed_scale, dtype)
    if config.rope is None:
        rows = positions + config.position_offset
        x = x + params["positions"]["embedding"][rows].astype(dtype)
    return sharding.constrain(x, *ROWS, None)


def rotations(
    config: DecoderConfig, positions: Array, min_length: Array | None = None
) -> PyTree:
    """(cos, sin) of layers without a window, and of layers with one if they differ.

    None if the model has no rotary positions; the second is None if there is one kind.
    `min_length` is that of `_rope.rotations`.
    """
    if config.rope is None:
        return None
    full = _rope.rotations(config.rope, config.head_dim, positions, min_length)
    if config.local_rope is None:
        return full, None
    local = _rope.rotations(config.local_rope, config.head_dim, positions, min_length)
    return full, local


def layer_rotation(
    rotations: PyTree, window: Array | None, rotates: Array | None
) -> PyTree:
    """The rotation of a layer with these entries of `scan_inputs`."""
    if rotations is None:
        return None
    found, local = rotations
    if local is not None:
        found = tuple(
            jnp.where(window == _NO_WINDOW, a, b)
            for a, b in zip(found, local, strict=True)
        )
    if rotates is None:
        return found
    cos, sin = found
    return jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)


def scan_inputs(config: DecoderConfig, blocks: Params, num_layers: int) -> PyTree:
    """The inputs of a scan over the first layers.

    Returns:
        (weights, windows, whether a layer rotates, index); windows is None if no layer
        has one, and the third is None if all layers rotate.
    """
    windows, rotates = config.windows, config.rope_layers
    if windows is not None:
        windows = [w or _NO_WINDOW for w in windows[:num_layers]]
        windows = jnp.array(windows, jnp.int32)
    if rotates is not None:
        rotates = jnp.array(rotates[:num_layers], jnp.bool_)
    return blocks, windows, rotates, jnp.arange(num_layers)


def _edit(edits, site, value, index):
    return edits[site](value, index) if site in edits else value


def _dense(layer: Params, x: Array, dtype: jnp.dtype) -> Array:
    # Batch and sequence are merged into one axis: with two, the gradient makes XLA
    # transpose activations on CPU, an eighth of the step's time at 135M parameters.
    # When both are sharded they stay two axes, because merging would gather one.
    rows = x if sharding.parts_of("context") > 1 else x.reshape(-1, x.shape[-1])
    y = _matmul.dot(rows, layer["kernel"], dtype)
    if "lora_a" in layer:
        y += low_rank(layer, rows, dtype)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y + layer["bias"].astype(x.dtype) if "bias" in layer else y


def _wide(layer: Params, x: Array, dtype: jnp.dtype) -> Array:
    # The name lets remat="mlp" save this product.
    return checkpoint_name(_dense(layer, x, dtype), "mlp")


def low_rank(layer: Params, x: Array, dtype: jnp.dtype) -> Array:
    """The product of x with LoRA's leaves, without forming an array like the kernel."""
    low = _matmul.dot(x, layer["lora_a"], dtype)
    return _matmul.dot(low, layer["lora_b"], dtype)
