# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of gradients: the gradient of one weighted total loss.

For example:

    ramp = optax.linear_schedule(0.0, 1.0, 100)
    combine.weighted_sum({"forget": 1.0, "retain": ramp})
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array


class WeightedSumState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: "weight/<term>" -> float32[], the weight in the last step; empty if
        `weights` is None.
    """

    count: Array
    stats: dict[str, Array]


def weighted_sum(
    weights: Mapping[str, float | Array | _common.Schedule] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Weighted sum of the terms' gradients: sum over k of w_k g_k.

    Args:
        weights: term -> a number or a schedule of the step; negative weights are
            allowed. None adds the gradients of all terms with weight 1.
    Returns:
        A transformation from {term: gradients} to one tree in the dtype of the first
        term (in the order of `weights`), summed in float32 or wider.
    Raises:
        ValueError: if a weight is not finite or there is none; in update, if a term has
            no weight. KeyError: in update, if a term with a weight has no gradients.
    """
    if weights is not None:
        weights = dict(weights)
        if not weights:
            raise ValueError(
                "weighted_sum needs at least one weight, got {}. "
                "Pass None to add every term."
            )
        for name, weight in weights.items():
            _checks.finite("weighted_sum", **{f"weight of {name!r}": weight})

    def init(params):
        del params
        stats = {f"weight/{name}": jnp.zeros([], jnp.float32) for name in weights or ()}
        return WeightedSumState(jnp.zeros([], jnp.int32), stats)

    def update(grads, state, params=None, *, values=None, **extra):
        del params, values, extra
        names = tuple(grads) if weights is None else tuple(weights)
        _common.exactly("weighted_sum", grads, names)
        trees = {name: grads[name] for name in names}
        _common.same_trees("weighted_sum", trees)
        if weights is None:
            factors, stats = [None] * len(names), {}
        else:
            factors = [_common.at(weights[name], state.count) for name in names]
            stats = {
                f"weight/{n}": x.astype(jnp.float32)
                for n, x in zip(names, factors, strict=True)
            }
        total = jax.tree.map(
            lambda *leaves: _common.mix(leaves, factors), *trees.values()
        )
        return total, WeightedSumState(optax.safe_increment(state.count), stats)

    return optax.GradientTransformationExtraArgs(init, update)
