# SPDX-License-Identifier: Apache-2.0
"""Updates of params that are stored below float32, without losing them to rounding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _precision, trees
from jaxunlearn.typing import Array, PRNGKey, PyTree

ROUNDINGS = ("nearest", "stochastic", "masters")


class RoundingState(NamedTuple):
    """State of `with_rounding`.

    Attributes:
        count: int32[], updates so far.
        masters: path -> float32 copy of a leaf that is stored below float32; empty
            unless rounding is "masters".
        inner: the wrapped chain's state, float32.
    """

    count: Array
    masters: dict[str, Array]
    inner: PyTree


def with_rounding(
    tx: optax.GradientTransformation, rounding: str = "masters", *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """A chain that trains params stored in bfloat16 or float16 as if in float32.

    bfloat16 has steps of 1/256 to 1/128 of a value, so an update of 1e-5 to a weight of
    0.02 is rounded away: training does nothing, or only a part. The moments of Adam
    suffer in the same way. Leaves that are float32 are not changed by this function and
    cost nothing.

    | rounding | params after an update | bytes: params, Adam's state |
    | --- | --- | --- |
    | "nearest" | the nearest value: small updates vanish | 2 + 4 |
    | "stochastic" | one of the two next values, the mean is right | 2 + 8 |
    | "masters" | the nearest value of a float32 copy | 2 + 12 |

    The state of the last two, such as Adam's moments, is float32.

    "masters" gives the float32 run, up to the rounding of the params that the model
    reads. The state is part of the optimizer's: it is placed on a mesh as the params
    are, and checkpointed with them.

    Args:
        tx: the chain, its combiner included.
        rounding: one of the three; "nearest" returns tx unchanged.
        seed: of the random draws of "stochastic", a whole number >= 0.
    Returns:
        A chain for the same params and gradients. Its updates of low leaves are
        float32, and exact: params plus updates is a value of the leaf's dtype.
    Raises:
        ValueError: if rounding is unknown or seed < 0.
    References: stochastic rounding as in Gupta et al. 2015,
        https://arxiv.org/abs/1502.02551; masters as in Micikevicius et al. 2017,
        https://arxiv.org/abs/1710.03740
    """
    _checks.one_of("with_rounding", ROUNDINGS, rounding=rounding)
    _checks.not_negative("with_rounding", seed=seed)
    tx = optax.with_extra_args_support(tx)
    if rounding == "nearest":
        return tx

    def init(params):
        low = _low(params) if rounding == "masters" else {}
        masters = {path: x.astype(jnp.float32) for path, x in low.items()}
        return RoundingState(jnp.int32(0), masters, tx.init(_wide(params)))

    def update(grads, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "with_rounding needs params in update, got None. Pass the params that "
                "train."
            )
        low = _low(params)
        wide = trees.map_with_path(
            lambda path, x: state.masters.get(path, x), _wide(params)
        )
        updates, inner = tx.update(_wide(grads), state.inner, wide, **extra)
        new = trees.paths(jax.tree.map(jnp.add, wide, updates))
        keys = _keys(seed, state.count, low)
        exact = {}
        for path, x in low.items():
            if rounding == "masters":
                rounded = new[path].astype(x.dtype)
            else:
                rounded = stochastic(new[path], x.dtype, keys[path])
            exact[path] = rounded.astype(jnp.float32) - x.astype(jnp.float32)
        masters = {path: new[path] for path in state.masters}
        updates = trees.map_with_path(lambda path, x: exact.get(path, x), updates)
        return updates, RoundingState(state.count + 1, masters, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _low(tree: PyTree) -> dict[str, Array]:
    return {k: x for k, x in trees.paths(tree).items() if _precision.is_low(x)}


def _wide(tree: PyTree) -> PyTree:
    """The tree with its low leaves in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if _precision.is_low(x) else x, tree
    )


def _keys(seed: int, count: Array, low: dict[str, Array]) -> dict[str, PRNGKey]:
    key = jax.random.fold_in(jax.random.key(seed), count)
    return {path: jax.random.fold_in(key, i) for i, path in enumerate(low)}


def stochastic(x: Array, dtype: jnp.dtype, key: PRNGKey) -> Array:
    """One of the two values of dtype around x, with x as its mean."""
    near = x.astype(dtype)
    error = x - near.astype(jnp.float32)
    outwards = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(near, outwards)
    gap = jnp.abs(other.astype(jnp.float32) - near.astype(jnp.float32))
    draw = jax.random.uniform(key, x.shape, jnp.float32)
    return jnp.where(draw * gap < jnp.abs(error), other, near)
