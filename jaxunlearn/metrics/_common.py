# SPDX-License-Identifier: Apache-2.0
"""Helpers of the metrics: dtypes, and checks of values on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxunlearn.typing import Array


def counted(logps: Array, where: Array | None) -> Array:
    """where, or a mask with the shape of logps that is True everywhere."""
    if where is None:
        return jnp.ones(jnp.shape(logps), bool)
    return jnp.asarray(where)


def on_host(owner: str, ndim: int = 1, **arrays: Any) -> list[np.ndarray]:
    """The arrays in float64; raises unless each has `ndim` axes, entries and no NaN."""
    found = []
    for name, array in arrays.items():
        values = np.asarray(array, np.float64)
        if values.ndim != ndim:
            raise ValueError(
                f"{owner} needs {name} with {ndim} axes, got shape {values.shape}."
            )
        if not values.size:
            raise ValueError(
                f"{owner} needs at least one value in {name}, got shape "
                f"{values.shape}. Check that the set is not empty."
            )
        bad = np.isnan(values)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{owner} needs {name} without NaN, got {bad.sum()} of {values.size}, "
                f"the first at {first}. NaN comes from examples without tokens or "
                "from a model that diverged. Leave such rows out and report it."
            )
        found.append(values)
    return found
