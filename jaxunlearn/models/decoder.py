# SPDX-License-Identifier: Apache-2.0
"""One decoder for the Llama family: plain functions over a nested dict of arrays.

Layers are stacked, [N, ...], and scanned, so compile time does not grow with depth. The
forward pass ends at the hidden states: `Model.unembed` is applied by the terms, a few
tokens at a time. Kernels are [in, out] and float32; each block casts its own to the
compute dtype when it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, sharding
from jaxunlearn.models import _attention, _rope
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import BATCH, ROWS
from jaxunlearn.typing import (
    Array,
    Batch,
    Model,
    Outputs,
    Params,
    PRNGKey,
    PyTree,
    Site,
)

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


# Width over fsdp; heads, hidden units and the vocabulary over tensor. Axis 0 of a
# block's leaf is its layer, which the scan walks.
RULES = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"unembed/kernel", ("fsdp", "tensor")),
    (r"blocks/attention/[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"blocks/mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"blocks/(attention/o|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"blocks/(attention/[qkv]|mlp/(gate|up))/bias", (None, "tensor")),
    (r".*/(scale|bias)", ()),
)


def make(config: DecoderConfig) -> Model:
    """The decoder that `config` describes, as a Model."""
    attention_units = config.heads * config.head_dim
    return Model(
        init=partial(init, config),
        apply=partial(apply, config),
        unembed=partial(unembed, config),
        sites={
            "attention": Site(
                attention_units, config.layers, "blocks/attention/o/kernel"
            ),
            "mlp": Site(config.hidden, config.layers, "blocks/mlp/down/kernel"),
            "block": Site(config.width, config.layers),
        },
        config=config,
        cache=partial(empty_cache, config),
        extend=partial(extend, config),
        rules=RULES,
        low_rank=True,
    )


def shapes(config: DecoderConfig) -> Params:
    """The params tree of `config` with a float32 jax.ShapeDtypeStruct at each leaf."""
    c, n = config, config.layers
    q_out, kv_out = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(into, out, bias):
        kernel = {"kernel": leaf(n, into, out)}
        return kernel | ({"bias": leaf(n, out)} if bias else {})

    attention = {
        "norm": {"scale": leaf(n, c.width)},
        "q": dense(c.width, q_out, c.qkv_bias),
        "k": dense(c.width, kv_out, c.qkv_bias),
        "v": dense(c.width, kv_out, c.qkv_bias),
        "o": dense(q_out, c.width, c.out_bias),
    }
    if c.qk_norm:
        attention["q_norm"] = {"scale": leaf(n, c.head_dim)}
        attention["k_norm"] = {"scale": leaf(n, c.head_dim)}
    mlp = {
        "norm": {"scale": leaf(n, c.width)},
        "gate": dense(c.width, c.hidden, c.mlp_bias),
        "up": dense(c.width, c.hidden, c.mlp_bias),
        "down": dense(c.hidden, c.width, c.mlp_bias),
    }
    tree = {
        "embed": {"embedding": leaf(c.vocab, c.width)},
        "blocks": {"attention": attention, "mlp": mlp},
        "final_norm": {"scale": leaf(c.width)},
    }
    return tree if c.tied else tree | {"unembed": {"kernel": leaf(c.width, c.vocab)}}


def init(config: DecoderConfig, rng: PRNGKey) -> Params:
    """Fresh float32 params: kernels and embeddings N(0, 0.02^2), biases 0, norms 1."""
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes(config))

    def leaf(keys, shape, key):
        match keys[-1].key:
            case "scale":
                return jnp.ones(shape.shape, shape.dtype)
            case "bias":
                return jnp.zeros(shape.shape, shape.dtype)
        return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)

    rngs = jax.random.split(rng, len(flat))
    return tree.unflatten(
        leaf(*item, key) for item, key in zip(flat, rngs, strict=True)
    )


def apply(
    config: DecoderConfig,
    params: Params,
    batch: Batch,
    *,
    taps: Mapping[str, Sequence[int]] | None = None,
    edits: Mapping[str, Callable[[Array, Array], Array]] | None = None,
    until: int | None = None,
    rng: PRNGKey | None = None,
) -> Outputs:
    """Runs the decoder over whole sequences.

    Args:
        config: the model.
        params: tree as `shapes` gives it.
        batch: `tokens` [B, L] int32 and `mask` [B, L] bool; positions count the real
            tokens.
        taps: site -> layers whose values to return.
        edits: site -> function (value, layer int32[]) -> value, applied in every layer.
        until: index of the last block to run; hidden is then that block's raw output.
        rng: unused, the decoder has no dropout.
    Returns:
        Outputs; hidden is [B, L, D] in the compute dtype.
    Raises:
        ValueError: if L exceeds the model's positions, or a site or layer does not
            exist.
    """
    del rng
    taps, edits = dict(taps or {}), dict(edits or {})
    count = config.layers if until is None else until + 1
    _check_call(config, batch, taps, edits, count)
    mask = batch["mask"]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rotation = _rope.rotations(config.rope, config.head_dim, positions)
    sees = _attention.causal(mask)
    distance = positions[:, :, None] - positions[:, None, :]

    def block(x, layer):
        weights, window, index = layer
        visible = sees if window is None else sees & (distance < window)
        attend = partial(_attention.attend, visible=visible)
        return _block(config, weights, x, rotation, attend, edits, index)

    if config.remat != "none":
        block = jax.checkpoint(block, policy=_POLICIES[config.remat], prevent_cse=False)

    slots = {site: _slots(layers, count) for site, layers in taps.items()}
    x = _embed(config, params, batch["tokens"])
    kept = {
        site: jnp.zeros((len(layers), *mask.shape, _units(config, site)), x.dtype)
        for site, layers in taps.items()
    }

    def body(carry, layer):
        x, kept = carry
        x, values = block(x, layer)
        index = layer[-1]
        kept = {
            site: kept[site].at[slots[site][index]].set(values[site], mode="drop")
            for site in kept
        }
        return (x, kept), None

    blocks = jax.tree.map(lambda leaf: leaf[:count], params["blocks"])
    (x, kept), _ = jax.lax.scan(body, (x, kept), _layers(config, blocks, count))
    return Outputs(
        x if until is not None else _norm(config, params["final_norm"], x), kept
    )


def unembed(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """Logits [..., V] float32 of final normed hidden states [..., D]."""
    dtype = jnp.dtype(config.compute_dtype)
    # Without constraints every fsdp rank repeats the whole product, with right numbers.
    if config.tied:
        kernel, form = params["embed"]["embedding"], "...d,vd->...v"
        kernel = sharding.constrain(kernel.astype(dtype), "tensor", None)
    else:
        kernel, form = params["unembed"]["kernel"], "...d,dv->...v"
        kernel = sharding.constrain(kernel.astype(dtype), None, "tensor")
    leading = [*ROWS, *[None] * hidden.ndim][: hidden.ndim - 1]
    hidden = sharding.constrain(hidden.astype(dtype), *leading, None)
    logits = jnp.einsum(form, hidden, kernel, preferred_element_type=jnp.float32)
    if not config.tied and "lora_a" in params["unembed"]:
        logits += _low_rank(params["unembed"], hidden).astype(jnp.float32)
    return sharding.constrain(logits, *leading, "tensor")


def empty_cache(config: DecoderConfig, batch_size: int, length: int) -> PyTree:
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
        cache: from `empty_cache` or an earlier call. The caller keeps used + T <=
            length.
    Returns:
        (hidden [B, T, D] final normed, the longer cache).
    """
    tokens, mask = batch["tokens"], batch["mask"]
    start = cache["used"]
    before = jnp.sum(cache["mask"], axis=1, keepdims=True, dtype=jnp.int32)
    positions = before + jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rotation = _rope.rotations(config.rope, config.head_dim, positions)
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
            return _attention.attend(q, keys, values, visible=visible)

        x, _ = _block(config, weights, x, rotation, attend, {}, index)
        return x, (keys, values)

    layers = _layers(config, params["blocks"], config.layers)
    x = _embed(config, params, tokens)
    x, (keys, values) = jax.lax.scan(body, x, (layers, cache["keys"], cache["values"]))
    cache = {
        "keys": keys,
        "values": values,
        "mask": all_mask,
        "positions": all_positions,
        "used": start + tokens.shape[1],
    }
    return _norm(config, params["final_norm"], x), cache


def _block(config, weights, x, rotation, attend, edits, index):
    """One decoder block: (x [B, L, D], {site: value})."""
    batch, length, _ = x.shape
    attention, mlp = weights["attention"], weights["mlp"]
    h = _norm(config, attention["norm"], x)
    q, k, v = (
        _dense(attention[name], h).reshape(batch, length, -1, config.head_dim)
        for name in ("q", "k", "v")
    )
    if config.qk_norm:
        q = _norm(config, attention["q_norm"], q)
        k = _norm(config, attention["k_norm"], k)
    q, k = _rope.rotate(q, *rotation), _rope.rotate(k, *rotation)
    # Each part of a sequence asks its own queries, of all keys and values.
    q = sharding.constrain(q, *ROWS, "tensor", None)
    k, v = (sharding.constrain(x, BATCH, None, "tensor", None) for x in (k, v))
    mixed = attend(q, k, v).reshape(batch, length, -1)
    mixed = _edit(edits, "attention", mixed, index)
    x = x + _dense(attention["o"], mixed)
    h = _norm(config, mlp["norm"], x)
    units = jax.nn.silu(_dense(mlp["gate"], h)) * _dense(mlp["up"], h)
    units = _edit(edits, "mlp", units, index)
    x = sharding.constrain(x + _dense(mlp["down"], units), *ROWS, None)
    x = _edit(edits, "block", x, index)
    return x, {"attention": mixed, "mlp": units, "block": x}


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
        y += _low_rank(layer, rows)
    y = y.reshape(*x.shape[:-1], kernel.shape[-1])
    return y + layer["bias"].astype(x.dtype) if "bias" in layer else y


def _low_rank(layer: Params, x: Array) -> Array:
    """What LoRA's leaves add to a product, with no array of a kernel's size."""
    return (x @ layer["lora_a"].astype(x.dtype)) @ layer["lora_b"].astype(x.dtype)


def _norm(config: DecoderConfig, layer: Params, x: Array) -> Array:
    """RMSNorm in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(
        jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps
    )
    return (wide * scale).astype(x.dtype) * layer["scale"].astype(x.dtype)


def _embed(config: DecoderConfig, params: Params, tokens: Array) -> Array:
    x = params["embed"]["embedding"][tokens].astype(jnp.dtype(config.compute_dtype))
    return sharding.constrain(x, *ROWS, None)


def _layers(config: DecoderConfig, blocks: Params, count: int) -> PyTree:
    """What the scan hands to each layer: (weights, window or None, index)."""
    windows = None
    if config.windows is not None:
        widest = jnp.iinfo(jnp.int32).max
        windows = jnp.array([w or widest for w in config.windows[:count]], jnp.int32)
    return blocks, windows, jnp.arange(count)


def _slots(layers: Sequence[int], count: int) -> Array:
    """For each layer, its row among the layers asked for, or one past the end
    (dropped)."""
    slots = jnp.full(count, len(layers), jnp.int32)
    return slots.at[jnp.array(layers, jnp.int32)].set(jnp.arange(len(layers)))


def _units(config: DecoderConfig, site: str) -> int:
    sizes = {"attention": config.heads * config.head_dim, "mlp": config.hidden}
    return sizes.get(site, config.width)


def _check_call(config, batch, taps, edits, count):
    owner = f"The {config.family} decoder"
    fix = "Add the column to the batch (data.encode makes both)."
    _checks.has_keys(owner, "columns", ("tokens", "mask"), batch, fix)
    length = batch["tokens"].shape[1]
    if length > config.longest:
        raise ValueError(
            f"{owner} needs sequences of at most {config.longest} tokens, got "
            f"{length}. Cut the texts, or encode them with a smaller length."
        )
    _checks.same_shape(owner, tokens=batch["tokens"], mask=batch["mask"])
    if not 1 <= count <= config.layers:
        raise ValueError(
            f"{owner} has layers 0 to {config.layers - 1}, got until={count - 1}."
        )
    for site in (*taps, *edits):
        _checks.one_of(owner, ("attention", "mlp", "block"), site=site)
    for site, layers in taps.items():
        once = len(set(layers)) == len(layers) > 0
        if not once or any(not 0 <= layer < count for layer in layers):
            raise ValueError(
                f"{owner} runs layers 0 to {count - 1} here, got taps of layers "
                f"{list(layers)} at {site!r}."
            )
