# SPDX-License-Identifier: Apache-2.0
"""PDU: forgetting under a constraint on the retain loss, by a primal-dual method.

For example:

    combine.primal_dual(epsilon=0.3, step_size=5.0, initial_dual=100.0)
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
    stats: {"dual": float32[], "violation": float32[]}, the multiplier of the last step
        and retain loss - epsilon.
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
    initial_dual: float = 1.0,
    step_size: float = 1.0,
    warmup_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Primal-dual update for: minimise the forget loss subject to retain <= epsilon.

    The update is weight * g_forget + mu * g_retain. The multiplier mu then takes a step
    of projected gradient ascent, mu <- max(0, mu + step_size * (l_retain - epsilon)):
    it grows while the constraint is violated and decays to 0 while it is slack.

    Args:
        forget: the term to minimise; it must be bounded below (`losses.logit_margin`,
            `losses.npo`).
        retain: the term that must not exceed epsilon.
        epsilon: bound on the retain term's value, in its unit (nats per token for NLL).
        weight: of the forget gradient, a number or a schedule of the step.
        initial_dual: mu at the first step, >= 0.
        step_size: of the ascent on mu, >= 0.
        warmup_steps: number of steps before mu changes.
    Returns:
        A transformation from {forget: gradients, retain: gradients} to one tree in the
        dtype of the forget gradients. Its `update` needs `values`, the losses of the
        terms in this step; make_step passes them.
    Raises:
        ValueError: if epsilon or weight is not finite, initial_dual, step_size or
            warmup_steps is negative, or the names are equal; in update, if there are
            surplus terms or no values. KeyError: in update, if a term has no gradients
            or no value.
    Paper and code: OpenUnlearning updates mu after every microbatch and in every
        process separately; here it is updated once per step, with the loss of the full
        batch.
    References: https://arxiv.org/abs/2506.05314
    """
    _checks.finite("primal_dual", epsilon=epsilon, weight=weight)
    _checks.not_negative(
        "primal_dual",
        initial_dual=initial_dual,
        step_size=step_size,
        warmup_steps=warmup_steps,
    )
    _common.different("primal_dual", forget, retain)

    def init(params):
        del params
        # Two arrays, because one array in two places could not be donated.
        stats = {k: jnp.zeros([], jnp.float32) for k in ("dual", "violation")}
        return PrimalDualState(
            jnp.zeros([], jnp.int32),
            jnp.asarray(initial_dual, jnp.float32),
            stats,
        )

    def update(grads, state, params=None, *, values=None, **extra):
        del params, extra
        g_forget, g_retain = _common.pair("primal_dual", grads, forget, retain)
        if values is None:
            raise ValueError(
                "primal_dual needs values={term: loss} with the gradients, got none. "
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
        moved = jnp.where(state.count >= warmup_steps, moved, state.dual)
        stats = {"dual": state.dual, "violation": violation}
        return total, PrimalDualState(optax.safe_increment(state.count), moved, stats)

    return optax.GradientTransformationExtraArgs(init, update)
