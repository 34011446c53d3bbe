# SPDX-License-Identifier: Apache-2.0
"""One decoder for many model families: pure functions over a nested dict of arrays.

Layers are stacked, [N, ...], and scanned, so compile time does not grow with depth. The
forward pass returns hidden states; the terms apply `Model.unembed` to a few tokens at a
time. Kernels are [in, out] and float32; each block casts them to the compute dtype when
it runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, sharding
from jaxunlearn.models import _attention, _block, _cache, _fused, _matmul
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import ROWS
from jaxunlearn.typing import Array, Batch, Model, Outputs, Params, PRNGKey, Site

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names("mlp"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


# In the order of a block: the normed input of q, k and v; the input of o; the output of
# attention; the normed input of gate and up; the input of down; the output of the MLP;
# and the output of the block.
_SITES = (
    *("attention_in", "attention", "attention_out"),
    *("mlp_in", "mlp", "mlp_out", "block"),
)

# With experts, in place of "mlp": the router's logits, and the weight of every expert
# in the token's output, 0 for those that do not compute it.
_EXPERT_SITES = ("router", "experts")

# Width over fsdp; heads, hidden units and the vocabulary over tensor. Axis 0 of a leaf
# in `blocks` is the layer, which is scanned and not sharded.
RULES = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"positions/embedding", (None, "fsdp")),
    (r"unembed/kernel", ("fsdp", "tensor")),
    (r"unembed/bias", ("tensor",)),
    (r"blocks/attention/[qkv]/kernel", (None, "fsdp", "tensor")),
    (r"blocks/mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"blocks/(attention/o|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"blocks/(attention/[qkv]|mlp/(gate|up))/bias", (None, "tensor")),
    (r".*/(scale|bias)", ()),
)
# The axis `expert` splits experts, together with tensor, and whatever fsdp splits.
_EXPERT_RULES = (
    (r"blocks/mlp/experts/(gate|up)/kernel", (None, ("expert", "tensor"), "fsdp")),
    (r"blocks/mlp/experts/down/kernel", (None, ("expert", "tensor"), None, "fsdp")),
    (r"blocks/mlp/(router|shared_gate)/kernel", (None, ("fsdp", "expert"))),
    (r"blocks/mlp/shared/(gate|up)/kernel", (None, ("fsdp", "expert"), "tensor")),
    (r"blocks/mlp/shared/down/kernel", (None, "tensor", ("fsdp", "expert"))),
    *(
        (rule, tuple(("fsdp", "expert") if axis == "fsdp" else axis for axis in axes))
        for rule, axes in RULES
    ),
)


@functools.lru_cache(maxsize=64)
def make(config: DecoderConfig) -> Model:
    """The decoder that `config` describes, as a Model.

    Equal configs give the same Model, so that programs compiled for it run again.
    """
    units, n = config.heads * config.head_dim, config.layers
    shared = (config.heads // config.kv_heads, config.head_dim)
    o, down = "blocks/attention/o/kernel", "blocks/mlp/down/kernel"
    qkv = tuple(f"blocks/attention/{name}/kernel" for name in "qkv")
    up = tuple(
        f"blocks/mlp/{x}/kernel" for x in (("gate", "up") if config.gated else ("up",))
    )
    # With a norm after the kernel, an output of the kernel is not a unit of the site.
    writers = (lambda path: ()) if config.post_norms else (lambda path: (path,))
    sites = {
        "attention_in": Site(config.width, n, readers=qkv),
        "attention": Site(units, n, o, readers=(o,), writers=qkv[2:], grouping=shared),
        "attention_out": Site(config.width, n, writers=writers(o)),
        "mlp_in": Site(config.width, n, readers=up),
        "mlp": Site(config.hidden, n, down, readers=(down,), writers=up),
        "mlp_out": Site(config.width, n, writers=writers(down)),
        "block": Site(config.width, n),
    }
    if config.experts is not None:
        sites = _with_experts(config, sites)
    applied = partial(apply, config)
    return Model(
        init=partial(init, config),
        apply=applied,
        unembed=partial(unembed, config),
        sites=sites,
        config=config,
        init_cache=partial(_cache.empty, config),
        decode=partial(_cache.decode, config),
        prepare_decode=partial(_cache.prepare_decode, config),
        rules=RULES if config.experts is None else _EXPERT_RULES,
        low_rank=True,
        target_logps=(
            partial(_fused.target_logps, config)
            if config.unembed == "tokamax"
            else None
        ),
        packs=applied if config.attention in ("auto", "xla") else None,
    )


def _with_experts(config: DecoderConfig, sites: dict[str, Site]) -> dict[str, Site]:
    """The sites of a decoder whose MLPs are mixtures of experts."""
    num, n = config.experts.num, config.layers
    # A weight of 0 and a `down` kernel of 0 are the same output.
    weights = Site(num, n, "blocks/mlp/experts/down/kernel")
    shared = ("blocks/mlp/shared_gate/kernel",) if config.experts.shared_hidden else ()
    readers = ("blocks/mlp/router/kernel", *shared)
    changed = {
        "mlp_in": Site(config.width, n, readers=readers),
        "router": Site(num, n, writers=readers[:1]),
        "experts": weights,
        "mlp_out": Site(config.width, n),
    }
    names = dict.fromkeys(name for name in (*sites, *changed) if name != "mlp")
    return {name: changed.get(name, sites.get(name)) for name in names}


def resized(model: Model, params: Params) -> Model:
    """The decoder `model` with MLPs as wide as those of `params`.

    Use it to run and save the result of `edits.remove_units`.

    Raises:
        ValueError: if model was not made by `make`.
    """
    if not isinstance(model.config, DecoderConfig):
        raise ValueError(
            "resized needs a model of models.make, got one whose config is a "
            f"{type(model.config).__name__}. Construct the smaller model yourself."
        )
    mlp = params["blocks"]["mlp"]
    hidden = mlp.get("experts", mlp)["down"]["kernel"].shape[-2]
    return make(dataclasses.replace(model.config, hidden=hidden))


def shapes(config: DecoderConfig) -> Params:
    """The params tree of `config` with a float32 jax.ShapeDtypeStruct at each leaf."""
    c, n = config, config.layers
    q_out, kv_out = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(*sizes):
        *stack, into, out, bias = sizes
        kernel = {"kernel": leaf(n, *stack, into, out)}
        return kernel | ({"bias": leaf(n, *stack, out)} if bias else {})

    def norm(name, *shape):
        if c.norm == "layer_unscaled":
            return {}
        bias = {"bias": leaf(*shape)} if c.norm == "layer" else {}
        return {name: {"scale": leaf(*shape)} | bias}

    attention = {
        "q": dense(c.width, q_out, c.qkv_bias),
        "k": dense(c.width, kv_out, c.qkv_bias),
        "v": dense(c.width, kv_out, c.qkv_bias),
        "o": dense(q_out, c.width, c.out_bias),
    }

    def mlp_of(hidden, *stack):
        kernels = {
            "up": dense(*stack, c.width, hidden, c.mlp_bias),
            "down": dense(*stack, hidden, c.width, c.mlp_bias),
        }
        gate = {"gate": dense(*stack, c.width, hidden, c.mlp_bias)}
        return kernels | (gate if c.gated else {})

    if c.experts is None:
        mlp = mlp_of(c.hidden)
    else:
        mlp = {
            "router": dense(c.width, c.experts.num, False),
            "experts": mlp_of(c.hidden, c.experts.num),
        }
        if c.experts.shared_hidden:
            mlp["shared"] = mlp_of(c.experts.shared_hidden)
            mlp["shared_gate"] = dense(c.width, 1, False)
    if c.pre_norms:
        attention |= norm("norm", n, c.width)
        mlp |= {} if c.shared_norm else norm("norm", n, c.width)
    if c.qk_norm:
        one = c.qk_norm_over == "head"
        attention |= norm("q_norm", n, c.head_dim if one else q_out)
        attention |= norm("k_norm", n, c.head_dim if one else kv_out)
    if c.post_norms:
        attention |= norm("post_norm", n, c.width)
        mlp |= norm("post_norm", n, c.width)
    tree = {
        "embed": {"embedding": leaf(c.vocab, c.width)},
        "blocks": {"attention": attention, "mlp": mlp},
        **norm("final_norm", c.width),
    }
    if c.rope is None:
        rows = c.positions + c.position_offset
        tree["positions"] = {"embedding": leaf(rows, c.width)}
    unembed = {} if c.tied else {"kernel": leaf(c.width, c.vocab)}
    unembed |= {"bias": leaf(c.vocab)} if c.unembed_bias else {}
    return tree | ({"unembed": unembed} if unembed else {})


def init(config: DecoderConfig, key: PRNGKey) -> Params:
    """Random float32 params: kernels and embeddings N(0, 0.02^2), biases 0, norms with
    scale 1."""
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes(config))

    def leaf(keys, shape, key):
        match keys[-1].key:
            case "scale":
                one = 0.0 if config.norm == "rms_plus_one" else 1.0
                return jnp.full(shape.shape, one, shape.dtype)
            case "bias":
                return jnp.zeros(shape.shape, shape.dtype)
        return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)

    keys = jax.random.split(key, len(flat))
    return tree.unflatten(
        leaf(*item, key) for item, key in zip(flat, keys, strict=True)
    )


def apply(
    config: DecoderConfig,
    params: Params,
    batch: Batch,
    *,
    taps: Mapping[str, Sequence[int]] | None = None,
    edits: Mapping[str, Callable[[Array, Array], Array]] | None = None,
    until: int | None = None,
    key: PRNGKey | None = None,
) -> Outputs:
    """Runs the decoder over complete sequences.

    Args:
        config: the model.
        params: params of the shapes of `shapes`.
        batch: `tokens` [B, L] int32 and `mask` [B, L] bool; positions count real tokens
            only. With `ends` and `positions`, each [B, L] int32, a row holds several
            sequences: a token at index k of a row is seen by those from k to ends[k] -
            1, and `positions` counts the tokens of its sequence before it. Attention is
            then XLA's, and the lengths of rotary positions are those of the row.
        taps: site -> layers whose values to return.
        edits: site -> function (value, layer int32[]) -> value, applied in every layer.
        until: index of the last block to run; hidden is then the block's output,
            without the final norm.
        key: unused; the decoder has no dropout.
    Returns:
        Outputs; hidden is [B, L, D] in the compute dtype, and NaN in rows with a real
        token outside the vocabulary. A mixture of experts also returns its routing.
    Raises:
        ValueError: if L exceeds the model's positions, or a site or layer does not
            exist.
    """
    del key
    taps, edits = dict(taps or {}), dict(edits or {})
    num_layers = config.layers if until is None else until + 1
    _check_call(config, batch, taps, edits, num_layers)
    mask = batch["mask"]
    if "ends" in batch:
        positions = batch["positions"]
        attends = _attention.for_trees(config, mask, positions, batch["ends"])
    else:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        attends = _attention.for_sequences(config, mask, positions)
    rotations = _block.rotations(config, positions)

    dtype = jnp.dtype(config.compute_dtype)
    dtypes = {s: jnp.float32 if s in _EXPERT_SITES else dtype for s in taps}

    def block(x, layer):
        weights, window, rotates, index = layer
        attend = attends(window, index)
        rotation = _block.layer_rotation(rotations, window, rotates)
        x, values = _block.run(config, weights, x, rotation, attend, edits, index, mask)
        found = {site: values[site].astype(dtypes[site]) for site in taps}
        return x, found, values.get("routing")

    if config.remat != "none":
        block = jax.checkpoint(block, policy=_POLICIES[config.remat], prevent_cse=False)

    slots = {site: _slots(layers, num_layers) for site, layers in taps.items()}
    x = _block.embed(config, params, batch["tokens"], positions, mask)
    tapped = {
        site: jnp.zeros(
            (len(layers), *mask.shape, _units(config, site)),
            dtypes[site],
        )
        for site, layers in taps.items()
    }

    def body(carry, layer):
        x, tapped = carry
        x, values, routing = block(x, layer)
        index = layer[-1]
        tapped = {
            site: tapped[site].at[slots[site][index]].set(values[site], mode="drop")
            for site in tapped
        }
        return (x, tapped), routing

    blocks = jax.tree.map(lambda leaf: leaf[:num_layers], params["blocks"])
    layers = _block.scan_inputs(config, blocks, num_layers)
    (x, tapped), routing = jax.lax.scan(body, (x, tapped), layers)
    if until is None:
        x = _block.norm(config, params.get("final_norm"), x)
    return Outputs(x.astype(dtype), tapped, routing)


def unembed(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """Logits [..., V] float32 of hidden states [..., D] after the final norm."""
    dtype = jnp.dtype(config.compute_dtype)
    # Without these constraints every fsdp rank computes the full product: the result is
    # right but slow.
    if config.tied:
        embed = params["embed"]  # `prepare_decode` adds a copy in the compute dtype
        kernel = embed.get("unembedding", embed["embedding"])
        split = ("tensor", None)
    else:
        kernel, split = params["unembed"]["kernel"], (None, "tensor")
    kernel = sharding.constrain(_matmul.cast(kernel, dtype), *split)
    leading = [*ROWS, *[None] * hidden.ndim][: hidden.ndim - 1]
    hidden = sharding.constrain(hidden.astype(dtype), *leading, None)
    logits = _matmul.logits(hidden, kernel, transposed=config.tied)
    if not config.tied and "lora_a" in params["unembed"]:
        low = _block.low_rank(params["unembed"], hidden, dtype)
        logits += low.astype(jnp.float32)
    if config.unembed_bias:
        logits += params["unembed"]["bias"].astype(jnp.float32)
    if config.logit_divisor is not None:
        logits /= config.logit_divisor
    logits = sharding.constrain(logits, *leading, "tensor")
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _slots(layers: Sequence[int], num_layers: int) -> Array:
    """For each layer its index in `layers`; out of range (dropped) if it is absent."""
    slots = jnp.full(num_layers, len(layers), jnp.int32)
    return slots.at[jnp.array(layers, jnp.int32)].set(jnp.arange(len(layers)))


def _units(config: DecoderConfig, site: str) -> int:
    sizes = {"attention": config.heads * config.head_dim, "mlp": config.hidden}
    if config.experts is not None:
        sizes |= dict.fromkeys(_EXPERT_SITES, config.experts.num)
    return sizes.get(site, config.width)


def _check_call(config, batch, taps, edits, num_layers):
    owner = f"The {config.family} decoder"
    fix = "Add the column to the batch (data.encode makes both)."
    _checks.has_keys(owner, "columns", ("tokens", "mask"), batch, fix)
    length = batch["tokens"].shape[1]
    if length > config.max_length:
        raise ValueError(
            f"{owner} needs sequences of at most {config.max_length} tokens, got "
            f"{length}. Shorten the texts, or encode them with a smaller length."
        )
    _checks.same_shape(owner, tokens=batch["tokens"], mask=batch["mask"])
    if not 1 <= num_layers <= config.layers:
        raise ValueError(
            f"{owner} has layers 0 to {config.layers - 1}, got until={num_layers - 1}."
        )
    sites = _SITES
    if config.experts is not None:
        sites = (*(site for site in _SITES if site != "mlp"), *_EXPERT_SITES)
    for site in (*taps, *edits):
        _checks.one_of(owner, sites, site=site)
    for site, layers in taps.items():
        distinct = len(set(layers)) == len(layers) > 0
        if not distinct or any(not 0 <= layer < num_layers for layer in layers):
            raise ValueError(
                f"{owner} needs taps of distinct layers 0 to {num_layers - 1}, got "
                f"{list(layers)} at {site!r}."
            )
