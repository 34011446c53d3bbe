# SPDX-License-Identifier: Apache-2.0
"""Weights that shrink and receive noise, so that distillation can rebuild a model."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _directions, _precision, trees
from jaxunlearn.edits import _quantize
from jaxunlearn.typing import Params, PRNGKey


def perturb(
    params: Params, key: PRNGKey, *, shrink: float = 0.1, noise: float = 0.1
) -> Params:
    """Shrinks all weights and adds noise to the matrices.

        matrix [in, out]    W <- (1 - shrink) W + shrink * noise * N
        scale or bias       w <- (1 - shrink) w

    N is Xavier-uniform: uniform on [-c, c] with c = sqrt(6 / (in + out)). Stacked
    matrices [..., in, out] are drawn one by one. UNDO damages an unlearned model in
    this way and then distils the unlearned model into the result. Shrink 0 is the
    identity; shrink 1 with noise 1 is a fresh model.

    Args:
        params: the model to edit. Leaves named `scale` or `bias`, and leaves with one
            axis, are vectors; all others are matrices.
        key: draws the noise.
        shrink: alpha, in [0, 1]. UNDO uses 0.1 to 0.8.
        noise: beta, >= 0. UNDO uses 0.1, and 0 for its largest models.
    Returns:
        A tree like params, with its dtypes and sharding.
    Raises:
        ValueError: if shrink is outside [0, 1] or noise is negative.
    References: https://arxiv.org/abs/2506.06278
    """
    if not 0 <= shrink <= 1:
        raise ValueError(
            f"perturb needs shrink in [0, 1], got shrink={shrink}. It is the fraction "
            "of every weight that is lost."
        )
    _checks.not_negative("perturb", noise=noise)
    keys = dict(
        zip(
            trees.paths(params),
            jax.random.split(key, len(jax.tree.leaves(params))),
            strict=True,
        )
    )

    def leaf(path, x):
        wide = _precision.widest([x])
        new = (1 - jnp.asarray(shrink, wide)) * x.astype(wide)
        if noise and _directions.is_matrix(path, x):
            bound = (6 / sum(x.shape[-2:])) ** 0.5
            draws = jax.random.uniform(keys[path], x.shape, wide, -bound, bound)
            new += jnp.asarray(shrink * noise, wide) * draws
        return _quantize.placed(new.astype(x.dtype), x)

    return trees.map_with_path(leaf, params)
