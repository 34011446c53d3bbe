# SPDX-License-Identifier: Apache-2.0
"""Forgetting under a constraint on the retain loss: the primal-dual method of PDU.

combine.primal_dual(epsilon=0.3, step_size=5.0, dual=100.0)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array


class PrimalDualState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    dual: float32[], mu, the multiplier of the next step.
    stats: {"dual": float32[], "violation": float32[]}, the multiplier used last and by
        how much the retain loss exceeded epsilon.
    """

    count: Array
    dual: Array
    stats: dict[str, Array]


def primal_dual(
    *,
    forget: str = "forget",
    retain: str = "retain",
    epsilon: float,
    weight: float | Array | _common.Schedule = 1.0,
    dual: float = 1.0,
    step_size: float = 1.0,
    warm_up: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Minimises the forget loss subject to retain loss <= epsilon.

    The update is weight * g_forget + mu * g_retain; then the multiplier follows its
    own gradient, mu <- max(0, mu + step_size * (l_retain - epsilon)). It grows while
    the constraint is violated and decays to 0 where it is slack.

    Args:
        forget: the term to minimise; bounded below (`losses.logit_margin`, `losses.npo`).
        retain: the term to be kept at or below epsilon.
        epsilon: bound on the retain term's value, in its unit (nats per token for NLL).
        weight: of the forget gradient, number or schedule of the step.
        dual: mu at the first step, >= 0.
        step_size: of the ascent on mu, >= 0.
        warm_up: number of steps before mu begins to move.
    Returns:
        A transformation from {forget: gradients, retain: gradients} to one tree in the
        dtype of the forget gradients. Its update must be given `values` (make_step
        does), the terms' losses of this step.
    Raises:
        ValueError: if epsilon or weight is not finite, dual, step_size or warm_up is
            negative, the names are equal or, in update, surplus terms or no values
            came. KeyError: in update, if a term has no gradients or no value.
    Paper and code: OpenUnlearning moves mu after every microbatch and in every process
        by itself; here it moves once a step, by the loss of the whole batch.
    References: https://arxiv.org/abs/2506.05314
    """
    _checks.finite("primal_dual", epsilon=epsilon, weight=weight)
    _checks.not_negative("primal_dual", dual=dual, step_size=step_size, warm_up=warm_up)
    _common.different("primal_dual", forget, retain)

    def init(params):
        del params
        # Two arrays: one in both places could not be donated.
        stats = {k: jnp.zeros([], jnp.float32) for k in ("dual", "violation")}
        return PrimalDualState(
            jnp.zeros([], jnp.int32),
            jnp.asarray(dual, jnp.float32),
            stats,
        )

    def update(grads, state, params=None, *, values=None, **extra):
        del params, extra
        g_forget, g_retain = _common.pair("primal_dual", grads, forget, retain)
        if values is None:
            raise ValueError(
                "primal_dual needs values={term: loss} beside the gradients, got none. "
                "Call update(grads, state, params, values=...), as make_step does."
            )
        fix = "Pass the losses of the terms whose gradients these are."
        _checks.has_keys("primal_dual", "the values of terms", (retain,), values, fix)
        factors = (_common.at(weight, state.count), state.dual)
        total = jax.tree.map(
            lambda a, b: _common.mix((a, b), factors), g_forget, g_retain
        )
        violation = jnp.asarray(values[retain]).astype(jnp.float32) - epsilon
        moved = jnp.maximum(0.0, state.dual + step_size * violation)
        moved = jnp.where(state.count >= warm_up, moved, state.dual)
        stats = {"dual": state.dual, "violation": violation}
        return total, PrimalDualState(optax.safe_increment(state.count), moved, stats)

    return optax.GradientTransformationExtraArgs(init, update)
