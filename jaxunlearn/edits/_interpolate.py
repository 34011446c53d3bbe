# SPDX-License-Identifier: Apache-2.0
"""Model merging: a weighted average of two models with a common origin."""

import jax
import jax.numpy as jnp

from jaxunlearn import _precision
from jaxunlearn.edits import _quantize, _task_vector
from jaxunlearn.typing import Params


def interpolate(params: Params, other: Params, *, weight: float = 0.5) -> Params:
    """(1 - weight) * params + weight * other, leaf by leaf.

    It is computed in float32 (float64 for float64 leaves). Weight 0 gives params,
    weight 1 gives other. For example, average the original and the unlearned model.

    Args:
        params: one model; the result has its dtypes and sharding.
        other: the other model, with the same leaves. To merge more models, call again.
        weight: of `other`, in [0, 1]; for values outside use `task_vector`.
    Returns:
        A tree like params.
    Raises:
        ValueError: if weight is outside [0, 1] or the trees differ.
    References: https://arxiv.org/abs/2203.05482. The second-placed system of
        SemEval-2025 Task 4 (https://arxiv.org/abs/2503.21088) merged two unlearned
        models by TIES, which is another method.
    """
    if not 0 <= weight <= 1:
        raise ValueError(
            f"interpolate needs a weight in [0, 1], got weight={weight}. Use "
            "task_vector for other values."
        )
    _task_vector.check_same("interpolate", params, other=other)

    def leaf(x, y):
        wide = _precision.widest([x])
        w = jnp.asarray(weight, wide)
        new = (1 - w) * x.astype(wide) + w * y.astype(wide)
        return _quantize.placed(new.astype(x.dtype), x)

    return jax.tree.map(leaf, params, other)
