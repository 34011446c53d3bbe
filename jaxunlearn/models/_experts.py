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
    shape = dict(mesh.shape)
    parts = math.prod(shape[a] for a in experts or ())
    # Rows of other devices with other experts: gathered before, summed after.
    gathers = "expert" in (rows or ()) and experts is not None
    scatters = experts is not None and x.shape[-1] % shape.get("tensor", 1) == 0

    def on_device(layers, x, weights, chosen):
        if width is not None:
            layers = {
                name: {
                    leaf: _gather(value, "fsdp", axis)
                    for leaf, value in layer.items()
                    for axis in [_width_axis(name, leaf)]
                }
                for name, layer in layers.items()
            }
        if gathers:
            x, weights, chosen = (_gather(v, "expert", 0) for v in (x, weights, chosen))
        first = None
        if parts > 1:
            first = jax.lax.axis_index(experts) * (num // parts)
            with jax.named_scope(f"runs_1_{parts}"):
                out = compute(layers, x, weights, chosen, first)
        else:
            out = compute(layers, x, weights, chosen, first)
        if experts is None:
            return out
        if gathers:
            out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        else:
            out = jax.lax.psum(out, "expert")
        if scatters:
            return jax.lax.psum_scatter(out, "tensor", scatter_dimension=2, tiled=True)
        return jax.lax.psum(out, "tensor")

    def spec_of(name, leaf, value):
        axes = [experts, None, None]
        axis = _width_axis(name, leaf)
        if axis is not None:
            axes[axis] = width
        return PartitionSpec(*axes)

    specs = {
        name: {leaf: spec_of(name, leaf, value) for leaf, value in layer.items()}
        for name, layer in layers.items()
    }
    dtype = x.dtype
    layers = jax.tree.map(lambda value: value.astype(dtype), layers)
    inputs = PartitionSpec(rows, length, None)
    out = jax.shard_map(
        on_device,
        in_specs=(specs, inputs, inputs, inputs),
        out_specs=PartitionSpec(rows, length, "tensor" if scatters else None),
        check_vma=False,
    )(layers, x, weights, chosen)
    return sharding.constrain(out, *ROWS, None)


def _width_axis(name: str, leaf: str) -> int | None:
    """The axis of a leaf [E, in, out] that has the model's width, if one has."""
    if name == "down":
        return {"kernel": 2, "lora_b": 2}.get(leaf)
    return {"kernel": 1, "lora_a": 1}.get(leaf)


def _gather(x: Array, name: str, axis: int | None) -> Array:
    if axis is None:
        return x
    return jax.lax.all_gather(x, name, axis=axis, tiled=True)


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
