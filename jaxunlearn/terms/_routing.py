# SPDX-License-Identifier: Apache-2.0
"""How the router of a mixture distributes the tokens of a term over experts."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxunlearn.typing import Array, Batch, Metrics, Routing, Total


def balance(routing: Routing, batches: Sequence[Batch]) -> Total:
    """The load-balancing loss of `load_balance`, weighted by the real tokens."""
    layers, _, num = routing.tokens.shape
    count = _tokens(batches)
    tokens, probs = (jnp.sum(x, axis=(0, 1)) for x in routing)
    rows = jnp.maximum(count, 1).astype(jnp.float32) * layers
    loss = num * jnp.sum(tokens / rows * (probs / rows))
    return Total(loss * count.astype(jnp.float32), count)


def metrics(routing: Routing, batches: Sequence[Batch]) -> Metrics:
    """What every term on a mixture reports about its rows.

    `load_balance` is the loss of that name. `expert_share_max` and `expert_share_min`
    are the largest and the smallest share of a layer's pairs of token and chosen expert
    that one expert computes, 1 / E if the load is even. `dropped` is the share of pairs
    that no expert computes. With microbatches they are means over these, weighted by
    tokens.
    """
    count = _tokens(batches)
    tokens = jnp.sum(routing.tokens, axis=1)
    pairs = jnp.maximum(jnp.sum(tokens, axis=-1, keepdims=True), 1.0)
    shares = tokens / pairs

    def total(value):
        return Total(value * count.astype(jnp.float32), count)

    return {
        "load_balance": balance(routing, batches),
        "expert_share_max": total(jnp.max(shares)),
        "expert_share_min": total(jnp.min(shares)),
        "dropped": total(jnp.zeros((), jnp.float32)),  # groups have no capacity
    }


def rows(routing: Routing, cuts: Sequence[slice]) -> Routing:
    """The Routing of the rows of some streams."""

    def take(x: Array) -> Array:
        return jnp.concatenate([x[:, i] for i in cuts], axis=1)

    return Routing(take(routing.tokens), take(routing.probs))


def _tokens(batches: Sequence[Batch]) -> Array:
    return sum(jnp.sum(batch["mask"], dtype=jnp.int32) for batch in batches)
