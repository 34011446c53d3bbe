# SPDX-License-Identifier: Apache-2.0
"""Two metrics of gradients from the condensation paper."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.typing import Array, PyTree


def unlearning_metric(*, forget: PyTree, retain: PyTree) -> Array:
    """Unlearning metric (UM): 100 (1 - cos) of the gradients of two sets of one class.

    The gradients are those of the forgotten rows and of the retained rows of a class.
    Average UM over the classes that both sets have; it is undefined for a class without
    retained rows. A high value means that the model no longer treats forgotten rows as
    it treats other rows of their class.

    Args:
        forget: tree of gradients of the mean loss on the forgotten rows.
        retain: the same on the retained rows.
    Returns:
        [] float32 in [0, 200], percent; NaN if a gradient is zero.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    length = trees.norm(forget) * trees.norm(retain)
    return 100 * (1 - trees.vdot(forget, retain) / length)


def overfitting_metric(loss: Array, grads: PyTree) -> Array:
    """Overfitting metric (OM) of one row: | loss - mean of (d loss / d weight)^2 |.

    The mean is over all weights. Average OM over rows; a high value means little
    overfitting. Run the model in inference mode, with stored statistics and no dropout.

    Args:
        loss: [] float, the loss of the row, nats.
        grads: the gradient of the loss.
    Returns:
        [] float32.
    Paper and code: the code runs the model in training mode on a batch of one row, for
        which batch normalisation is not meaningful.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    _checks.same_shape("overfitting_metric", loss=loss, one_row=jnp.float32(0))
    count = sum(x.size for x in jax.tree.leaves(grads))
    return jnp.abs(loss.astype(jnp.float32) - trees.vdot(grads, grads) / count)
