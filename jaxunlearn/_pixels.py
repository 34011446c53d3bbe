# SPDX-License-Identifier: Apache-2.0
"""Pixels: uint8 in [0, 255], or floats in [0, 1]."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxunlearn import _checks


def as_float(owner: str, pixels: Any) -> Any:
    """Pixels as float32 in [0, 1]; uint8 is divided by 255.

    Args:
        owner: the caller, for error messages.
        pixels: a NumPy or JAX array; the result is of the same kind.
    Raises:
        TypeError: if the dtype is neither uint8 nor float.
    """
    _check_dtype(owner, pixels)
    if pixels.dtype == jnp.uint8:
        return pixels.astype("float32") / 255
    return pixels if pixels.dtype == jnp.float32 else pixels.astype("float32")


def check(owner: str, table: Mapping[str, Any], shape: Sequence | None = None) -> None:
    """Checks the images of a table, with concrete values (not under jit).

    Args:
        owner: the caller, for error messages.
        table: `image` [n, H, W, C], uint8 in [0, 255] or float in [0, 1].
        shape: the required (H, W, C); None for any.
    Raises:
        KeyError: without the column `image`.
        ValueError: for another shape, no image, or values out of range or not finite.
        TypeError: for another dtype.
    """
    has_shape(owner, table, shape)
    pixels = table["image"]
    if pixels.dtype == jnp.uint8:
        return
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # true for NaN
        raise ValueError(
            f"{owner} needs floats in [0, 1], got {low:g} to {high:g}. Divide by 255, "
            "or give the pixels as uint8."
        )


def has_shape(owner: str, table: Mapping[str, Any], shape: Sequence | None) -> None:
    """`check` without the range, which mixtures of images can exceed slightly."""
    fix = "data.images.table makes them."
    _checks.has_keys(owner, "columns", ("image",), table, fix)
    pixels = table["image"]
    came = tuple(pixels.shape)
    if len(came) != 4 or 0 in came or came[1:] != tuple(shape or came[1:]):
        sides = "H, W, C" if shape is None else ", ".join(map(str, shape))
        raise ValueError(
            f"{owner} needs images [n, {sides}], n >= 1, got shape {came}. Channels "
            "come last; resize or pad the images."
        )
    _check_dtype(owner, pixels)


def _check_dtype(owner: str, pixels: Any) -> None:
    if pixels.dtype != jnp.uint8 and not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise TypeError(
            f"{owner} needs uint8 pixels in [0, 255] or floats in [0, 1], got "
            f"{pixels.dtype}. Convert them."
        )
