# SPDX-License-Identifier: Apache-2.0
"""Selective synaptic dampening: weights that matter to the forget set shrink."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _quantize, _task_vector
from jaxunlearn.typing import Params, PyTree


def dampen(
    params: Params,
    forget: PyTree,
    all_data: PyTree,
    *,
    alpha: float = 10.0,
    lambda_: float = 1.0,
) -> Params:
    """Scales weights by min(lambda D / F, 1) wherever F > alpha D.

    F and D are importances of each weight on the forget set and on all training data,
    forget set included: the diagonal of the Fisher information, the mean of squared
    gradients of the log-likelihood. Both by one rule, as only their ratio counts. Where
    D is 0 and F is not, the weight becomes 0; where F is 0, nothing changes.

    Args:
        params: the model to edit.
        forget: F, a tree like params, >= 0.
        all_data: D, the same on all data.
        alpha: how many times more a weight must matter to the forget set, > 0; larger
            changes fewer weights.
        lambda_: strength; smaller shrinks more, > 0.
    Returns:
        A tree like params, in its dtypes and, where they lie on a mesh, its shards.
    Raises:
        ValueError: if alpha or lambda_ is not > 0, importances are NaN or negative, or
            the trees differ.
    Paper and code: the released code takes the mean gradient of a batch before it
    squares, and alpha 10 (5 for its vision transformer) with lambda 1.
    References: https://arxiv.org/abs/2308.07707
    """
    _checks.positive("dampen", alpha=alpha, lambda_=lambda_)
    _task_vector.check_same("dampen", params, forget=forget, all_data=all_data)
    _check_importances(forget=forget, all_data=all_data)

    def leaf(x, f, d):
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        f, d = f.astype(wide), d.astype(wide)
        chosen = f > alpha * d
        factor = jnp.minimum(lambda_ * d / jnp.where(chosen, f, 1), 1)
        new = jnp.where(chosen, x.astype(wide) * factor, x.astype(wide))
        return _quantize.placed(new.astype(x.dtype), x)

    return jax.tree.map(leaf, params, forget, all_data)


def _check_importances(**importances: PyTree) -> None:
    for name, tree in importances.items():
        for path, x in trees.paths(tree).items():
            if not isinstance(x, jax.core.Tracer) and not bool(jnp.all(x >= 0)):
                raise ValueError(
                    f"dampen needs importances >= 0, got negative ones or NaN in "
                    f"{name} at {path!r}. Give means of squared gradients."
                )
