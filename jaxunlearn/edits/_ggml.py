# SPDX-License-Identifier: Apache-2.0
"""ggml's blocks of 32 weights, Q4_0, Q4_1 and Q8_0: the values a GGUF file gives back.

Codes come from comparisons where ggml adds a half and cuts off: a compiler may fuse a
product with the addition after it, which rounds once instead of twice.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.typing import Array

BLOCK = 32
KINDS = ("q4_0", "q4_1", "q8_0")


def rounded(w: Array, kind: str) -> Array:
    """w [..., in, out] float32 in blocks along its inputs, which 32 divides.

    | kind | scale d | code | value |
    | --- | --- | --- | --- |
    | "q4_0" | m / -8, m the weight of largest size | cut(w / d + 8.5) | d (code - 8) |
    | "q4_1" | (max - min) / 15 | cut((w - min) / d + 0.5) | d code + min |
    | "q8_0" | largest size / 127 | w / d, halves away from 0 | d code |

    Codes of 4 bits are 15 at most. They are found with d as it is; values take d and
    min in float16. 1 / d is rounded before it multiplies. All this is the reference of
    ggml, to the bit: a d beyond 65504 becomes infinite, as there.
    """
    blocks = w.reshape(*w.shape[:-2], -1, BLOCK, w.shape[-1])
    new = {"q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0}[kind](blocks)
    return new.reshape(w.shape)


def _q4_0(blocks: Array) -> Array:
    first = jnp.argmax(jnp.abs(blocks), -2, keepdims=True)
    scale = jnp.take_along_axis(blocks, first, -2) / -8
    codes = _cut(blocks * _inverse(scale), 8.5)
    return _half(scale) * (codes - 8)


def _q4_1(blocks: Array) -> Array:
    low, high = (f(blocks, -2, keepdims=True) for f in (jnp.min, jnp.max))
    scale = _over(high - low, 15)
    codes = _cut((blocks - low) * _inverse(scale), 0.5)
    return _half(scale) * codes + _half(low)  # the product is exact, fused or not


def _q8_0(blocks: Array) -> Array:
    scale = _over(jnp.max(jnp.abs(blocks), -2, keepdims=True), 127)
    x = blocks * _inverse(scale)
    size = jnp.abs(x)
    whole = jnp.floor(size)
    codes = jnp.where(size >= whole + 0.5, whole + 1, whole)
    return _half(scale) * (jnp.sign(x) * codes)


def _over(x: Array, number: float) -> Array:
    """x / number, divided: compilers multiply by the inverse of what they can see."""
    return x / jax.lax.optimization_barrier(jnp.full_like(x, number))


def _inverse(scale: Array) -> Array:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _cut(x: Array, half: float) -> Array:
    """trunc(x + half) in 0 .. 15, added in float32."""
    codes = jnp.zeros_like(x)
    for least in _LEAST[half]:
        codes += (x >= least).astype(x.dtype)
    return codes


def _least(half: float, code: int) -> np.float32:
    """The smallest float32 x whose sum with `half`, rounded, reaches the code."""
    half, x = np.float32(half), np.float32(code - half)
    while np.nextafter(x, np.float32(-np.inf)) + half >= code:
        x = np.nextafter(x, np.float32(-np.inf))
    return x


_LEAST = {half: [_least(half, code) for code in range(1, 16)] for half in (0.5, 8.5)}


def _half(x: Array) -> Array:
    """x rounded to float16, which two casts would not promise under a compiler."""
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    small = jnp.round(x * 2.0**24) * 2.0**-24  # below its normal numbers: fixed steps
    return jnp.where(jnp.abs(x) < 2.0**-14, small, normal)
