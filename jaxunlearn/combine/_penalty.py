# SPDX-License-Identifier: Apache-2.0
"""The penalty method for a simple bi-level problem: the baseline for `blur`.

For example:

    combine.penalty(strength=optax.linear_schedule(1.0, 100.0, 1000))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array


class PenaltyState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: {"strength": float32[]}, the strength of the last step.
    """

    count: Array
    stats: dict[str, Array]


def penalty(
    *,
    upper: str = "retain",
    lower: str = "forget",
    strength: float | Array | _common.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Gradient of upper + strength * lower: g_upper + strength_t g_lower.

    If both levels have the same variables, this is the value-function penalty of Shen
    and Chen 2023, because the optimal value of the lower level is a constant. With a
    fixed strength it converges to where the two gradients balance, not to the lower
    optimum; with a growing strength it approaches the lower optimum.

    Args:
        upper: term that is minimised among the solutions of the lower level.
        lower: term whose minimisers are the constraint.
        strength: lambda, a number or a schedule of the step, >= 0.
    Returns:
        A transformation from {upper: gradients, lower: gradients} to one tree in the
        dtype of the upper gradients.
    Raises:
        ValueError: if strength < 0 or the names are equal; in update, if there are
            surplus terms. KeyError: in update, if a level has no gradients.
    Paper and code: BLUR's released `Pen` mode is g_forget + gamma g_retain, which here
        is penalty(upper="forget", lower="retain", strength=gamma).
    References: https://arxiv.org/abs/2302.05185
    """
    _checks.not_negative("penalty", strength=strength)
    _common.different("penalty", upper, lower)

    def init(params):
        del params
        return PenaltyState(
            jnp.zeros([], jnp.int32), {"strength": jnp.zeros([], jnp.float32)}
        )

    def update(grads, state, params=None, *, values=None, **extra):
        del params, values, extra
        g_upper, g_lower = _common.pair("penalty", grads, upper, lower)
        factor = _common.at(strength, state.count)
        total = jax.tree.map(
            lambda a, b: _common.mix((a, b), (None, factor)), g_upper, g_lower
        )
        stats = {"strength": factor}
        return total, PenaltyState(optax.safe_increment(state.count), stats)

    return optax.GradientTransformationExtraArgs(init, update)
