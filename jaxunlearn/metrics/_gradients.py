# SPDX-License-Identifier: Apache-2.0
"""What gradients say of forgetting: the condensation paper's two metrics."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.typing import Array, PyTree


def unlearning_metric(forget: PyTree, retain: PyTree) -> Array:
    """UM: 100 (1 - cos) of the gradients of forgotten and of retained rows of a class.

    Average it over the classes that the two sets share. High means that the model
    treats forgotten rows as others of their class no longer; it is undefined for a
    class of which nothing is retained.

    Args:
        forget, retain: trees of gradients of the mean loss, of one structure.
    Returns:
        float32 in [0, 200], percent; NaN where a gradient is zero.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    length = trees.norm(forget) * trees.norm(retain)
    return 100 * (1 - trees.vdot(forget, retain) / length)


def overfitting_metric(loss: Array, grads: PyTree) -> Array:
    """OM: | loss - mean over weights of (d loss / d weight)^2 | of one row.

    Average it over rows; high means less overfitted. Take the model as it is used, with
    stored statistics and no dropout.

    Args:
        loss: [] float, the row's loss, nats.
        grads: its gradient.
    Returns:
        float32 [].
    Paper and code: the code takes it in training mode with a batch of one row, for
        which batch normalisation is meaningless.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    _checks.same_shape("overfitting_metric", loss=loss, one_row=jnp.float32(0))
    count = sum(x.size for x in jax.tree.leaves(grads))
    return jnp.abs(loss.astype(jnp.float32) - trees.vdot(grads, grads) / count)
