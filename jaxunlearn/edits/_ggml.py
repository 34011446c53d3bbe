# SPDX-License-Identifier: Apache-2.0
"""ggml's blocks of 32 weights, Q4_0, Q4_1 and Q8_0: the values read from a GGUF file.

ggml adds a half and truncates. Here codes are found by comparisons, because a compiler
may fuse a product with the addition that follows, which rounds once instead of twice.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.typing import Array

BLOCK = 32
KINDS = ("q4_0", "q4_1", "q8_0")


def rounded(w: Array, kind: str) -> Array:
    """Rounds w [..., in, out] float32, in blocks of 32 inputs, to the values of `kind`.

    32 must divide the number of inputs.

    | kind | scale d | code | value |
    | --- | --- | --- | --- |
    | "q4_0" | m / -8, m the weight of largest |w| | trunc(w / d + 8.5) | d (code - 8) |
    | "q4_1" | (max - min) / 15 | trunc((w - min) / d + 0.5) | d code + min |
    | "q8_0" | max |w| / 127 | round(w / d), halves away from 0 | d code |

    4-bit codes are at most 15. Codes are computed with d in float32, values with d and
    min in float16. 1 / d is rounded before the product. This equals the reference of
    ggml to the bit: as there, a d above 65504 becomes infinite.
    """
    blocks = w.reshape(*w.shape[:-2], -1, BLOCK, w.shape[-1])
    new = {"q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0}[kind](blocks)
    return new.reshape(w.shape)


def _q4_0(blocks: Array) -> Array:
    first = jnp.argmax(jnp.abs(blocks), -2, keepdims=True)
    scale = jnp.take_along_axis(blocks, first, -2) / -8
    codes = _truncated(blocks * _inverse(scale), 8.5)
    return _half(scale) * (codes - 8)


def _q4_1(blocks: Array) -> Array:
    low, high = (f(blocks, -2, keepdims=True) for f in (jnp.min, jnp.max))
    scale = _over(high - low, 15)
    codes = _truncated((blocks - low) * _inverse(scale), 0.5)
    return _half(scale) * codes + _half(low)  # the product is exact, so fusing is safe


def _q8_0(blocks: Array) -> Array:
    scale = _over(jnp.max(jnp.abs(blocks), -2, keepdims=True), 127)
    x = blocks * _inverse(scale)
    size = jnp.abs(x)
    floor = jnp.floor(size)
    codes = jnp.where(size >= floor + 0.5, floor + 1, floor)
    return _half(scale) * (jnp.sign(x) * codes)


def _over(x: Array, number: float) -> Array:
    """x / number as a true division; XLA multiplies by the inverse of a constant."""
    return x / jax.lax.optimization_barrier(jnp.full_like(x, number))


def _inverse(scale: Array) -> Array:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _truncated(x: Array, half: float) -> Array:
    """trunc(x + half), with a float32 sum, clipped to 0 .. 15."""
    codes = jnp.zeros_like(x)
    for threshold in _THRESHOLDS[half]:
        codes += (x >= threshold).astype(x.dtype)
    return codes


def _threshold(half: float, code: int) -> np.float32:
    """The smallest float32 x with x + half >= code in float32."""
    half, x = np.float32(half), np.float32(code - half)
    while np.nextafter(x, np.float32(-np.inf)) + half >= code:
        x = np.nextafter(x, np.float32(-np.inf))
    return x


_THRESHOLDS = {h: [_threshold(h, code) for code in range(1, 16)] for h in (0.5, 8.5)}


def _half(x: Array) -> Array:
    """x rounded to float16; a compiler may remove a pair of casts, but not this."""
    normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
    small = jnp.round(x * 2.0**24) * 2.0**-24  # subnormal numbers have a fixed spacing
    return jnp.where(jnp.abs(x) < 2.0**-14, small, normal)
