# SPDX-License-Identifier: Apache-2.0
"""The reduced retain set: condensed images where this is safe, originals elsewhere."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxunlearn import _checks, _pixels
from jaxunlearn.data import table as tables
from jaxunlearn.synth._condense import Condensed


class Reduced(NamedTuple):
    """A retain set that contains no information about the forget set.

    Attributes:
        table: condensed images of safe buckets, then original images of the others.
        rows: [k] int, the rows of these originals in the full table, increasing.
        ratio: number of its rows over that of the retain set, usually in (0, 1].
    """

    table: tables.Table
    rows: np.ndarray
    ratio: float


def reduce_retain(
    table: tables.Table,
    buckets: np.ndarray,
    condensed: Condensed,
    forget_rows: Iterable[int],
) -> Reduced:
    """Reduces the retain set: condensed images for buckets without forgotten images.

    A bucket is unsafe if it has a forgotten image. Its condensed image is not used; its
    retained images are used instead. If a uniform random fraction f of the images is
    forgotten and buckets have s images, the ratio is about

        1 - (1 - f)^(s - 1) (1 - 1 / s)

    so at f = 0.1 there is hardly any reduction. If a whole class is forgotten, it is
    1 / s.

    Args:
        table: all images.
        buckets: [n] int, the bucket of each image.
        condensed: one image for every bucket, and no other.
        forget_rows: indices of the rows to forget.
    Returns:
        The reduced set; its images are float32, as the condensed ones are.
    Raises:
        ValueError: if a row index is out of range, a bucket has no condensed image or a
            condensed image no bucket, the numbers of buckets and images differ, or
            images are out of range or of two shapes. TypeError: if images have another
            dtype, or indices are not integers.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "reduce_retain"
    _pixels.check(owner, table)
    _pixels.has_shape(owner, condensed.table, table["image"].shape[1:])
    buckets, count = np.asarray(buckets), tables.num_rows(table)
    if buckets.shape != (count,):
        raise ValueError(
            f"{owner} needs a bucket for each of {count} images, got shape "
            f"{buckets.shape}. Use the buckets of this table."
        )
    _checks.integers(owner, buckets=buckets)
    forget = np.unique(list(forget_rows))
    if not forget.size or forget[0] < 0 or forget[-1] >= len(buckets):
        raise ValueError(
            f"{owner} needs forget_rows from 0 to {len(buckets) - 1}, at least "
            f"one, got {forget[:8].tolist()}."
        )
    _checks.integers(owner, forget_rows=forget)
    names, images = np.asarray(condensed.buckets), tables.num_rows(condensed.table)
    if names.shape != (images,):
        raise ValueError(
            f"{owner} needs a bucket for each of {images} condensed images, got "
            f"{names.size}. Use the result of condense or invert."
        )
    missing, surplus = np.setdiff1d(buckets, names), np.setdiff1d(names, buckets)
    if missing.size or surplus.size:
        raise ValueError(
            f"{owner} needs one condensed image for each bucket, got none for "
            f"{missing[:8].tolist()} and surplus ones for {surplus[:8].tolist()}. "
            "Condense the same buckets."
        )
    unsafe = np.unique(buckets[forget])
    safe = ~np.isin(condensed.buckets, unsafe)
    rows = np.setdiff1d(np.flatnonzero(np.isin(buckets, unsafe)), forget)
    kept = tables.select(table, rows)
    kept["image"] = _pixels.as_float(owner, kept["image"])
    small = tables.select(condensed.table, np.flatnonzero(safe))
    joined = {name: np.concatenate([small[name], kept[name]]) for name in small}
    retained = len(buckets) - len(forget)
    if not len(joined["tokens"]):
        raise ValueError(
            f"{owner} needs at least one row to retain, got forget_rows with all."
        )
    return Reduced(joined, rows, len(joined["tokens"]) / retained)
