# SPDX-License-Identifier: Apache-2.0
"""Updates added to params, and task vectors: what finetuning added, subtracted."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision, trees
from jaxunlearn.typing import Params


def task_vector(
    params: Params, tuned: Params, base: Params | None = None, *, scale: float = 1.0
) -> Params:
    """Subtracts a task vector: params - scale * (tuned - base), leaf by leaf.

    It is computed in float32 (float64 for float64 leaves). Scale 0 is the identity.

    Args:
        params: the model to edit.
        tuned: `base` after finetuning on the forget set.
        base: the params before that finetuning; None means `params`.
        scale: factor of the vector, finite; a negative scale adds it. MUSE uses 5.
    Returns:
        A tree like params, with its dtypes and sharding.
    Raises:
        ValueError: if scale is not finite or the trees differ.
    References: https://arxiv.org/abs/2212.04089, https://arxiv.org/abs/2407.06460
    """
    _checks.finite("task_vector", scale=scale)
    base = params if base is None else base
    check_same("task_vector", params, tuned=tuned, base=base)

    def leaf(x, tuned, base):
        wide = _precision.widest([x])
        vector = tuned.astype(wide) - base.astype(wide)
        return (x.astype(wide) - jnp.asarray(scale, wide) * vector).astype(x.dtype)

    return jax.tree.map(leaf, params, tuned, base)


def add(params: Params, update: Params, *, scale: float = 1.0) -> Params:
    """params + scale * update, leaf by leaf, such as a step against a gradient.

    It is computed in float32 (float64 for float64 leaves).

    Args:
        params: the model to edit, or the half of it that changes (trees.split).
        update: a tree like params.
        scale: factor of the update, finite.
    Returns:
        A tree like params, with its dtypes and sharding.
    Raises:
        ValueError: if scale is not finite or the trees differ.
    """
    _checks.finite("add", scale=scale)
    check_same("add", params, update=update)

    def leaf(x, update):
        wide = _precision.widest([x])
        step = jnp.asarray(scale, wide) * update.astype(wide)
        return (x.astype(wide) + step).astype(x.dtype)

    return jax.tree.map(leaf, params, update)


def check_same(owner: str, params: Params, **others: Params) -> None:
    """Raises ValueError unless all trees have the leaves and shapes of params."""
    wanted = _shapes(params)
    for name, other in others.items():
        different = sorted(path for path, _ in _shapes(other).items() ^ wanted.items())
        if different:
            raise ValueError(
                f"{owner} needs {name} to have the leaves and shapes of params, got "
                f"differences at {_checks.listed(dict.fromkeys(different))}."
            )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in trees.paths(tree).items()}
