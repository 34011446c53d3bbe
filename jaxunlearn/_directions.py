# SPDX-License-Identifier: Apache-2.0
"""The leading singular directions of stacked matrices, and a filter along them.

The public functions are `edits.collapse` and `combine.collapse`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn.typing import Array

SIDES = ("both", "in", "out")
METHODS = ("auto", "exact", "randomized")
_VECTORS = ("scale", "bias")
_EXTRA, _ITERATIONS = 8, 4  # of the randomised method: directions beyond rank, passes


def is_matrix(path: str, x: Array) -> bool:
    """Whether a leaf is a stack of matrices [..., in, out]."""
    return x.ndim >= 2 and path.split("/")[-1] not in _VECTORS


def is_exact(shape: tuple[int, ...], rank: int, method: str) -> bool:
    """Whether the directions come from an SVD of the matrix itself."""
    return method == "exact" or (method == "auto" and min(shape[-2:]) <= 2 * rank)


@partial(jax.jit, static_argnames=("rank", "exact"))
def leading(x: Array, rank: int, exact: bool) -> tuple[Array, Array, Array]:
    """(u [..., in, k], s [..., k], v [..., out, k]) of the k largest singular values;
    fewer where a side of the matrix is shorter than k."""
    x = x.astype(jnp.float32)
    if exact:
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        return u[..., :rank], s[..., :rank], vt.mT[..., :rank]
    size = min(rank + _EXTRA, *x.shape[-2:])
    # One fixed draw for all matrices: the result does not depend on a key.
    draw = jax.random.normal(jax.random.key(0), (x.shape[-1], size), jnp.float32)
    y = _product(x, jnp.broadcast_to(draw, (*x.shape[:-2], *draw.shape)))
    for _ in range(_ITERATIONS):
        y = _product(x, jnp.linalg.qr(_product(x.mT, jnp.linalg.qr(y)[0]))[0])
    q = jnp.linalg.qr(y)[0]
    u, s, vt = jnp.linalg.svd(_product(q.mT, x), full_matrices=False)
    return _product(q, u)[..., :rank], s[..., :rank], vt.mT[..., :rank]


def factors(s: Array, power: float) -> Array:
    """f_i = (s_k / s_i)^power; 1 for a matrix of zeros."""
    if math.isinf(power):
        return jnp.zeros_like(s)
    ratio = s[..., -1:] / jnp.where(s > 0, s, jnp.ones_like(s))
    return jnp.where(s > 0, ratio, jnp.ones_like(s)) ** jnp.float32(power)


@partial(jax.jit, static_argnames="sides")
def filtered(x: Array, u: Array, factors: Array, v: Array, sides: str) -> Array:
    """x with the directions u and v multiplied by their factors, float32."""
    x, cut = x.astype(jnp.float32), 1 - factors[..., None, :]
    if sides != "out":
        x -= _product(u * cut, _product(u.mT, x))
    if sides != "in":
        x -= _product(_product(x, v) * cut, v.mT)
    return x


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
