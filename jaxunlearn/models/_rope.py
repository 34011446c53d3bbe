# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings of the Llama family, in every kind of transformers.

A head of size d has d / 2 planes; plane i of a token at position p is rotated by the
angle p * w_i. The kinds differ in the frequencies w_i and in a scale on the cosines and
sines. With `dynamic` and `longrope` the frequencies of a row also depend on its length.

References: RoPE https://arxiv.org/abs/2104.09864, position interpolation (`linear`)
https://arxiv.org/abs/2306.15595, YaRN https://arxiv.org/abs/2309.00071, LongRoPE
https://arxiv.org/abs/2402.13753, Llama 3 https://arxiv.org/abs/2407.21783.
"""

import math

import jax.numpy as jnp
import numpy as np

from jaxunlearn.models import _config
from jaxunlearn.typing import Array


def frequencies(
    rope: _config.RopeConfig, head_dim: int, length: Array | int
) -> tuple[Array, float]:
    """Angle per position of each plane, and the scale on the cosines and sines.

    Args:
        rope: the kind and its numbers.
        head_dim: size of one attention head.
        length: [...] int, tokens of the sequence; may be traced. Only `dynamic` and
            `longrope` use it.
    Returns:
        (float32 [rotated / 2], for `dynamic` and `longrope` [..., rotated / 2]; scale),
        where rotated = head_dim * rope.partial.
    Raises:
        ValueError: if a number that the kind needs is missing, or no unit would rotate.
    """
    rotated = int(head_dim * rope.partial)
    if rotated < 2 or rotated % 2:
        raise ValueError(
            f"rope needs an even number of at least 2 rotated units, got {rotated} "
            f"from head_dim={head_dim} and partial={rope.partial}."
        )
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    if rope.kind == "dynamic":
        return _dynamic(rope, exponents, length), 1.0
    plain = 1.0 / np.float32(rope.theta) ** exponents
    match rope.kind:
        case "linear":
            return jnp.asarray(plain / np.float32(rope.factor)), 1.0
        case "llama3":
            return jnp.asarray(_llama3(rope, plain)), 1.0
        case "yarn":
            return jnp.asarray(_yarn(rope, plain)), _yarn_scale(rope)
        case "longrope":
            return _longrope(rope, plain, length), _longrope_scale(rope)
    return jnp.asarray(plain), 1.0


def rotations(
    rope: _config.RopeConfig,
    head_dim: int,
    positions: Array,
    min_length: Array | None = None,
) -> tuple[Array, Array]:
    """Cosine and sine of every token's angles, times the kind's attention scale.

    The frequencies of `dynamic` and `longrope` depend on the longest position of each
    row, so a row has the values that it has alone. transformers takes the longest
    position of the batch, which is the same for a batch of one row.

    Args:
        rope: the kind and its numbers.
        head_dim: size of one attention head.
        positions: [B, L] int32.
        min_length: [B] int32, the least length of each row, in tokens, if the row is
            part of a longer sequence.
    Returns:
        (cos, sin), each float32 [B, L, rotated / 2].
    """
    length = 1
    if rope.by_length:
        length = jnp.max(positions, axis=1, keepdims=True) + 1
        if min_length is not None:
            length = jnp.maximum(length, min_length[:, None])
    inverse, scale = frequencies(rope, head_dim, length)
    angles = positions.astype(jnp.float32)[..., None] * inverse
    scale = jnp.float32(scale)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, cos: Array, sin: Array, *, interleaved: bool = False) -> Array:
    """Rotates each head's planes; plane i is units i and i + rotated / 2.

    Args:
        x: [B, L, H, head_dim], queries or keys.
        cos: float32 [B, L, rotated / 2], from `rotations`.
        sin: the same.
        interleaved: plane i is units 2 i and 2 i + 1 instead.
    Returns:
        [B, L, H, head_dim] in the dtype of x, computed in float32. Units from `rotated`
        on are those of x.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    pair = (slice(half), slice(half, 2 * half))
    if interleaved:
        pair = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = (x[..., units].astype(jnp.float32) for units in pair)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    parts = [part.astype(x.dtype) for part in rotated]
    if interleaved:
        parts = [jnp.stack(parts, axis=-1).reshape(*x.shape[:-1], 2 * half)]
    return jnp.concatenate([*parts, x[..., 2 * half :]], axis=-1)


def _dynamic(rope, exponents: np.ndarray, length) -> Array:
    """Dynamic NTK: theta grows with the length beyond the trained one."""
    trained = _trained(rope)
    rotated = 2 * len(exponents)
    if rotated == 2:
        raise ValueError(
            "rope kind 'dynamic' needs at least 4 rotated units, got 2: its exponent "
            "divides by rotated - 2. Use another kind."
        )
    length = jnp.maximum(jnp.asarray(length).astype(jnp.float32), jnp.float32(trained))
    stretch = jnp.float32(rope.factor) * length / jnp.float32(trained)
    stretch = stretch - jnp.float32(rope.factor - 1)
    theta = jnp.float32(rope.theta) * stretch ** jnp.float32(rotated / (rotated - 2))
    return jnp.float32(1) / theta[..., None] ** exponents


def _llama3(rope, plain: np.ndarray) -> np.ndarray:
    """Divides slow planes by the factor, leaves fast ones, and blends in between."""
    trained, low, high = _trained(rope), rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    slow = np.where(wavelength > trained / low, plain / rope.factor, blended)
    return np.where(wavelength < trained / high, plain, slow).astype(np.float32)


def _yarn(rope, plain: np.ndarray) -> np.ndarray:
    """Interpolates slow planes, extrapolates fast ones, with a ramp in between."""
    planes = len(plain)

    def plane(turns):
        """The plane that makes `turns` full turns over the trained length."""
        span = math.log(_trained(rope) / (turns * 2 * math.pi))
        return planes * span / math.log(rope.theta)

    low, high = plane(rope.beta_fast), plane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * planes - 1)
    if low == high:
        high += 0.001  # avoids 0 / 0, as transformers does
    ramp = np.clip((np.arange(planes) - low) / (high - low), 0, 1)
    return (plain / rope.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_scale(rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def grown(times):
        return 1.0 if rope.factor <= 1 else 0.1 * times * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


def _longrope(rope, plain: np.ndarray, length) -> Array:
    """One divisor per plane; the long list applies beyond the trained length."""
    divided = []
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if factors is None or len(factors) != len(plain):
            came = "None" if factors is None else f"{len(factors)}"
            raise ValueError(
                f"rope kind 'longrope' needs {name} with {len(plain)} numbers, one per "
                f"rotated plane, got {came}. Take it from the checkpoint's config.json."
            )
        divided.append(jnp.asarray(plain / np.asarray(factors, np.float32)))
    long = jnp.asarray(length)[..., None] > _trained(rope)
    return jnp.where(long, divided[1], divided[0])


def _longrope_scale(rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(_trained(rope)))


def _trained(rope) -> int:
    if rope.original_positions is None:
        raise ValueError(
            f"rope kind {rope.kind!r} needs original_positions, the length the model "
            "was trained on, got None. Set RopeConfig(original_positions=...)."
        )
    return rope.original_positions
