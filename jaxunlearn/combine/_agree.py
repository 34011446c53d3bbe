# SPDX-License-Identifier: Apache-2.0
"""Forget gradients only where they agree in sign with the retain gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _precision, trees
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array, Params


class AgreeState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: float32[] scalars of the last step: `agree`, the fraction of entries of the
        lower gradient that pass the mask, and `norm`, that of the masked gradient.
    average: float32 tree like the params, the moving average of the upper gradient.
    """

    count: Array
    stats: dict[str, Array]
    average: Params


def agree(
    *,
    upper: str = "retain",
    lower: str = "forget",
    momentum: float = 0.9,
    strength: float | Array | _common.Schedule = 1.0,
    normalize: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """g_upper + strength * u, with u the lower gradient where the signs agree.

        m <- momentum m + (1 - momentum) g_upper
        u = g_lower * 1[sign(g_lower) = sign(m)]
        u <- u / |u|, if `normalize`

    A step against u lowers both losses in every entry that moves, to first order and
    for the averaged upper gradient. MUDMAN unlearns with it, with the lower gradient at
    an attacked model (`terms.displaced` with `terms.descend`). Entries where either is
    0 do not pass.

    Args:
        upper: term whose average decides the mask, usually retain.
        lower: term whose gradient is masked, usually forget.
        momentum: rho, in [0, 1); 0 compares with the upper gradient of the same step.
        strength: factor of u, a number or a schedule of the step, >= 0.
        normalize: whether u is scaled to norm 1 over all leaves, so that `strength` is
            its norm; a u of 0 stays 0.
    Returns:
        A transformation from {upper: gradients, lower: gradients} to one tree in the
        dtype of the upper gradients; its state is an AgreeState.
    Raises:
        ValueError: if a setting is out of range or the names are equal; in update, if
            there are surplus terms. KeyError: in update, if a level has no gradients.
    Paper and code: the released code takes separate steps with separate learning rates
        for the two terms, so its update is that of optax.sgd after this combiner, with
        `strength` the ratio of the rates.
    References: https://arxiv.org/abs/2506.12484
    """
    _common.different("agree", upper, lower)
    _checks.not_negative("agree", strength=strength)
    if not 0 <= momentum < 1:
        raise ValueError(f"agree needs momentum in [0, 1), got momentum={momentum}.")

    def init(params):
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        stats = {name: jnp.zeros([], jnp.float32) for name in ("agree", "norm")}
        return AgreeState(jnp.zeros([], jnp.int32), stats, zeros)

    def update(grads, state, params=None, *, values=None, **extra):
        del params, values, extra
        g_upper, g_lower = _common.pair("agree", grads, upper, lower)
        average = jax.tree.map(
            lambda m, g: momentum * m + (1 - momentum) * g.astype(jnp.float32),
            state.average,
            g_upper,
        )

        def masked(g, m):
            g = _precision.at_least_float32(g)
            return jnp.where(g * jnp.sign(m).astype(g.dtype) > 0, g, jnp.zeros_like(g))

        u = jax.tree.map(masked, g_lower, average)
        norm = trees.scaled_norm(u)
        factor = _common.at(strength, state.count)
        if normalize:
            factor /= jnp.where(norm > 0, norm, 1.0)
        total = jax.tree.map(
            lambda a, b: _common.mix((a, b), (None, factor)), g_upper, u
        )
        leaves = jax.tree.leaves(u)
        passed = sum(jnp.sum(x != 0, dtype=jnp.float32) for x in leaves)
        passed /= sum(x.size for x in leaves)
        stats = {"agree": passed, "norm": norm}
        return total, AgreeState(optax.safe_increment(state.count), stats, average)

    return optax.GradientTransformationExtraArgs(init, update)
