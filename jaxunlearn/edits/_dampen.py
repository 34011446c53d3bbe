# SPDX-License-Identifier: Apache-2.0
"""Selective synaptic dampening (SSD): shrinks weights important to the forget set."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision, trees
from jaxunlearn.edits import _quantize, _task_vector
from jaxunlearn.typing import Params, PyTree


def dampen(
    params: Params,
    *,
    forget: PyTree,
    all_data: PyTree,
    alpha: float = 10.0,
    lambda_: float = 1.0,
) -> Params:
    """Scales the weights with F > alpha D by min(lambda D / F, 1).

    F and D are importances of each weight on the forget set and on all training data,
    which includes the forget set: the diagonal of the Fisher information, that is, the
    mean of squared gradients of the log-likelihood (`stats.fisher`). Compute both in
    the same way, because only their ratio matters. A weight with D = 0 and F > 0
    becomes 0; a weight with F = 0 does not change.

    Args:
        params: the model to edit.
        forget: F, a tree like params, >= 0.
        all_data: D, the same on all data.
        alpha: smallest ratio F / D at which a weight is changed, > 0; a larger alpha
            changes fewer weights.
        lambda_: strength, > 0; a smaller lambda shrinks weights more.
    Returns:
        A tree like params, with its dtypes and sharding.
    Raises:
        ValueError: if alpha or lambda_ is not > 0, importances are NaN or negative, or
            the trees differ.
    Paper and code: the released code averages gradients over a batch before it squares
        them, and uses alpha = 10 (5 for its vision transformer) and lambda = 1.
    References: https://arxiv.org/abs/2308.07707
    """
    _checks.positive("dampen", alpha=alpha, lambda_=lambda_)
    _task_vector.check_same("dampen", params, forget=forget, all_data=all_data)
    _check_importances(forget=forget, all_data=all_data)

    def leaf(x, f, d):
        wide = _precision.widest([x])
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
                    f"dampen needs {name} >= 0, got negative values or NaN at {path!r}."
                    " Pass means of squared gradients, as stats.fisher gives them."
                )
