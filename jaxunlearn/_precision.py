# SPDX-License-Identifier: Apache-2.0
"""The precision of sums, logarithms and norms: float32, or float64 for such arrays.

The casts are explicit, because strict dtype promotion may be on.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxunlearn.typing import Array


def at_least_float32(x: Any) -> Array:
    """The array in float32; a float64 array does not change."""
    x = jnp.asarray(x)
    return x.astype(widest([x]))


def is_low(x: Any) -> bool:
    """Whether an array has floating-point values of less than 32 bits."""
    dtype = jnp.dtype(x.dtype)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def widest(arrays: Sequence[Array]) -> jnp.dtype:
    """float64 if one of the arrays is float64, else float32."""
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
