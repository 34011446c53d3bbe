# SPDX-License-Identifier: Apache-2.0
"""Helper of the losses."""

import jax.numpy as jnp

from jaxunlearn.typing import Array


def masked(loss: Array, where: Array | None) -> Array:
    """The loss, 0 where `where` is False; None counts all."""
    return loss if where is None else jnp.where(where, loss, 0.0)
