# SPDX-License-Identifier: Apache-2.0
"""Pixels: uint8 in [0, 255], or floats in [0, 1]."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxunlearn import _checks


def as_float(owner: str, pixels: Any) -> Any:
    """Pixels as float32, bytes divided by 255; NumPy's stay NumPy's, traced ones pass.

    Raises:
        TypeError: if they are neither uint8 nor float.
    """
    _look_at_dtype(owner, pixels)
    if pixels.dtype == jnp.uint8:
        return pixels.astype("float32") / 255
    return pixels if pixels.dtype == jnp.float32 else pixels.astype("float32")


def check(owner: str, table: Mapping[str, Any], shape: Sequence | None = None) -> None:
    """Raises unless a table's images are what image models take; on the host alone.

    Args:
        owner: who needs them.
        table: `image` [n, H, W, C], uint8 in [0, 255] or float in [0, 1].
        shape: (H, W, C) that they must have; any if None.
    Raises:
        KeyError: without images. ValueError: for another shape, no image, or values out
            of range or not finite. TypeError: for another dtype.
    """
    has_shape(owner, table, shape)
    pixels = table["image"]
    if pixels.dtype == jnp.uint8:
        return
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # of NaN too
        raise ValueError(
            f"{owner} needs floats in [0, 1], got {low:g} to {high:g}. Divide by 255, "
            "or give the pixels as uint8."
        )


def has_shape(owner: str, table: Mapping[str, Any], shape: Sequence | None) -> None:
    """`check` without the range, which blends of images may leave a little."""
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
    _look_at_dtype(owner, pixels)


def _look_at_dtype(owner: str, pixels: Any) -> None:
    if pixels.dtype != jnp.uint8 and not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise TypeError(
            f"{owner} needs uint8 pixels in [0, 255] or floats in [0, 1], got "
            f"{pixels.dtype}. Convert them."
        )
