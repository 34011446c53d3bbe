# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts: the choice of experts for each token, and their computation.

Tokens are sorted by expert, so that every kernel is one grouped product
(jax.lax.ragged_dot) with static shapes. No token is dropped, and tokens do not
influence each other. On a mesh every device computes its own experts on all tokens of
its rows: activations move, kernels of other experts do not.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxunlearn import sharding
from jaxunlearn.models._config import ExpertsConfig
from jaxunlearn.sharding import ROWS
from jaxunlearn.typing import Array, Params, Routing

_PARTS = ("expert", "tensor")  # the mesh axes that split experts


def router_logits(layer: Params, x: Array) -> Array:
    """[B, L, E] float32 of the input [B, L, D]."""
    kernel = layer["kernel"].astype(x.dtype)
    logits = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    if "lora_a" in layer:
        low = (x @ layer["lora_a"].astype(x.dtype)) @ layer["lora_b"].astype(x.dtype)
        logits += low.astype(jnp.float32)
    return sharding.constrain(logits, *ROWS, None)


def choose(config: ExpertsConfig, logits: Array) -> tuple[Array, Array, Array]:
    """The experts of each token, from the router's logits [B, L, E].

    Returns:
        (probabilities of all experts [B, L, E], weights of the chosen ones [B, L, k],
        their indices [B, L, k] int32), probabilities and weights in float32.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probs, config.per_token)
    if config.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probs, weights, chosen


def spread(weights: Array, chosen: Array, num: int) -> Array:
    """[B, L, E], the weight of every expert, 0 for those that were not chosen."""
    ones = jax.nn.one_hot(chosen, num, dtype=weights.dtype)
    return jnp.einsum("blk,blke->ble", weights, ones, precision="highest")


def routing(probs: Array, chosen: Array, mask: Array) -> Routing:
    """The numbers of a layer, [B, E], over the tokens of the mask [B, L]."""
    real = mask.astype(probs.dtype)
    ones = jax.nn.one_hot(chosen, probs.shape[-1], dtype=probs.dtype)
    return Routing(
        jnp.einsum("bl,blke->be", real, ones, precision="highest"),
        jnp.einsum("bl,ble->be", real, probs, precision="highest"),
    )


def run(
    layers: Params,
    x: Array,
    weights: Array,
    chosen: Array,
    activation: Callable[[Array], Array],
) -> Array:
    """The weighted sum of the chosen experts' outputs, [B, L, D].

    Args:
        layers: `gate`, `up` and `down`, whose leaves have the experts on axis 0.
        x: [B, L, D].
        weights: [B, L, k] float32.
        chosen: [B, L, k] int32.
        activation: of the gate.
    """
    compute = partial(_local, activation=activation)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(layers, x, weights, chosen, None)
    num = layers["down"]["kernel"].shape[0]
    (experts,) = sharding.spec((num,), _PARTS)
    rows, length, width = sharding.spec(x.shape, *ROWS, "fsdp")
    parts = math.prod(sharding.parts_of(axis) for axis in experts or ())
    # Rows of devices with other experts are gathered before and returned after.
    gathers = "expert" in (experts or ()) and "expert" in (rows or ())
    scatters = "tensor" in (experts or ()) and not (
        x.shape[-1] % sharding.parts_of("tensor")
    )

    def complete(name, leaf, value):
        axis = _width_axis(name, leaf)
        if axis is None or width is None:
            return value
        return _gather(value, "fsdp", axis)

    def on_device(layers, x, weights, chosen):
        layers = _map(complete, layers)
        if gathers:
            x, weights, chosen = (_gather(v, "expert", 0) for v in (x, weights, chosen))
        if parts == 1:
            return compute(layers, x, weights, chosen, None)
        first = jax.lax.axis_index(experts) * (num // parts)
        with jax.named_scope(f"runs_1_{parts}"):  # for plans: the share of pairs here
            out = compute(layers, x, weights, chosen, first)
        if gathers:
            out = _scatter(out, "expert", 0)
        if scatters:
            out = _scatter(out, "tensor", 2)
        done = ("expert",) * gathers + ("tensor",) * scatters
        others = tuple(axis for axis in experts if axis not in done)
        return jax.lax.psum(out, others) if others else out

    def spec_of(name, leaf, _):
        axes = [experts, None, None]
        if (axis := _width_axis(name, leaf)) is not None:
            axes[axis] = width
        return PartitionSpec(*axes)

    inputs = PartitionSpec(rows, length, None)
    split = scatters and parts > 1
    out = jax.shard_map(
        on_device,
        in_specs=(_map(spec_of, layers), inputs, inputs, inputs),
        out_specs=PartitionSpec(rows, length, "tensor" if split else None),
        check_vma=False,
    )(jax.tree.map(lambda leaf: leaf.astype(x.dtype), layers), x, weights, chosen)
    return sharding.constrain(out, *ROWS, None)


def _width_axis(name: str, leaf: str) -> int | None:
    """The axis of a leaf [E, in, out] that has the model's width, if one has."""
    if name == "down":
        return {"kernel": 2, "lora_b": 2}.get(leaf)
    return {"kernel": 1, "lora_a": 1}.get(leaf)


def _map(function: Callable, layers: Params) -> Params:
    """function(layer's name, leaf's name, leaf) for every leaf."""
    return {
        name: {leaf: function(name, leaf, value) for leaf, value in layer.items()}
        for name, layer in layers.items()
    }


def _gather(x: Array, name: str, axis: int) -> Array:
    return jax.lax.all_gather(x, name, axis=axis, tiled=True)


def _scatter(x: Array, name: str, axis: int) -> Array:
    return jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)


def _local(layers, x, weights, chosen, first, *, activation):
    """The part of the sum that the experts `first`, `first` + 1, ... of `layers`
    contribute; all experts if `first` is None."""
    *lead, width = x.shape
    count, num = chosen.shape[-1], layers["down"]["kernel"].shape[0]
    place = chosen.reshape(-1)
    if first is not None:
        place = place - first
        place = jnp.where((place >= 0) & (place < num), place, num)
    order = jnp.argsort(place, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.sum(place[:, None] == jnp.arange(num), axis=0, dtype=jnp.int32)
    here = None if first is None else (jnp.arange(len(place)) < jnp.sum(sizes))[:, None]

    def only_here(rows):
        # What ragged_dot gives for rows after the last group is not defined.
        return rows if here is None else jnp.where(here, rows, jnp.zeros_like(rows))

    def product(rows, kernel):
        return jax.lax.ragged_dot(rows, kernel.astype(rows.dtype), sizes)

    def dense(layer, rows):
        out = product(rows, layer["kernel"])
        if "lora_a" in layer:
            low = only_here(product(rows, layer["lora_a"]))
            out += product(low, layer["lora_b"])
        return out

    rows = jnp.broadcast_to(x[..., None, :], (*lead, count, width))
    rows = only_here(_permute(rows.reshape(-1, width), order, back))
    gate = checkpoint_name(dense(layers["gate"], rows), "mlp")
    up = checkpoint_name(dense(layers["up"], rows), "mlp")
    units = only_here(activation(gate) * up)
    out = only_here(dense(layers["down"], units))
    out = _permute(out, back, order).reshape(*lead, count, width)
    out = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=-2)
    return out.astype(x.dtype)


@jax.custom_vjp
def _permute(x: Array, order: Array, back: Array) -> Array:
    """x[order], where `back` is the inverse; the gradient is a gather too."""
    return jnp.take(x, order, axis=0)


def _permute_forward(x, order, back):
    return _permute(x, order, back), back


def _permute_backward(back, grad):
    return jnp.take(grad, back, axis=0), None, None


_permute.defvjp(_permute_forward, _permute_backward)
