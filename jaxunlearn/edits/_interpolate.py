# SPDX-License-Identifier: Apache-2.0
"""Merging: a model between two that share an origin, such as unlearned and original."""

import jax
import jax.numpy as jnp

from jaxunlearn.edits import _quantize, _task_vector
from jaxunlearn.typing import Params


def interpolate(params: Params, other: Params, *, weight: float = 0.5) -> Params:
    """(1 - weight) * params + weight * other, leaf by leaf.

    Runs in float32 (float64 for such leaves). Weight 0 is params, weight 1 is other.

    Args:
        params: the one end, and the dtypes and shards of the result.
        other: the other end, with the same leaves; for a model of several, merge again.
        weight: in [0, 1]; beyond them is `task_vector`'s.
    Returns:
        A tree like params.
    Raises:
        ValueError: if weight is outside [0, 1] or the trees differ.
    References: https://arxiv.org/abs/2203.05482. Merging two unlearned models by TIES,
        which this is not, took second place in https://arxiv.org/abs/2503.21088.
    """
    if not 0 <= weight <= 1:
        raise ValueError(
            f"interpolate needs a weight in [0, 1], got weight={weight}. Use "
            "task_vector to go beyond a model."
        )
    _task_vector.check_same("interpolate", params, other=other)

    def leaf(x, y):
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        w = jnp.asarray(weight, wide)
        new = (1 - w) * x.astype(wide) + w * y.astype(wide)
        return _quantize.placed(new.astype(x.dtype), x)

    return jax.tree.map(leaf, params, other)
