# SPDX-License-Identifier: Apache-2.0
"""The reduced retain set: condensed where that is safe, as it was elsewhere."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxunlearn import _checks, _pixels
from jaxunlearn.data import table as tables
from jaxunlearn.synth._condense import Condensed


class Reduced(NamedTuple):
    """A retain set without a trace of the forget set.

    Attributes:
        table: condensed images of safe buckets, then the retained ones of the others.
        rows: [k] int, which rows of the whole table those are, rising.
        ratio: its rows over those of the retain set, in (0, 1] or a little above.
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
    """Condensed images of buckets without a forgotten image; elsewhere the originals.

    A bucket is unsafe if one of its images is to be forgotten: its condensed image is
    left out, and the images that stay come as they are. For a uniform random share f of
    forgotten images and buckets of s images the ratio is about

        1 - (1 - f)^(s - 1) (1 - 1 / s)

    so that at f = 0.1 hardly anything is saved; for a whole class it is 1 / s.

    Args:
        table: all images.
        buckets: [n] int, of each of them.
        condensed: one image for every bucket, and for no other.
        forget_rows: numbers of the rows to forget.
    Returns:
        The reduced set; images are float32 in [0, 1], as condensed ones are.
    Raises:
        ValueError: for rows there are not, a condensed set that lacks a bucket or has
            another, another number of buckets than of images, or images out of range or
            of two shapes. TypeError: for another dtype, or numbers that are not whole.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "reduce_retain"
    _pixels.check(owner, table)
    _pixels.has_shape(owner, condensed.table, table["image"].shape[1:])
    buckets, count = np.asarray(buckets), tables.num_rows(table)
    if buckets.shape != (count,):
        raise ValueError(
            f"{owner} needs a bucket for each of {count} images, got "
            f"{buckets.shape}. Take the buckets of this table."
        )
    _checks.whole(owner, buckets=buckets)
    forget = np.unique(list(forget_rows))
    if not forget.size or forget[0] < 0 or forget[-1] >= len(buckets):
        raise ValueError(
            f"{owner} needs forget_rows from 0 to {len(buckets) - 1}, at least "
            f"one, got {forget[:8].tolist()}."
        )
    _checks.whole(owner, forget_rows=forget)
    names, images = np.asarray(condensed.buckets), tables.num_rows(condensed.table)
    if names.shape != (images,):
        raise ValueError(
            f"{owner} needs a bucket for each of {images} condensed images, got "
            f"{names.size}. Take what condense or invert gave."
        )
    lacking, strange = np.setdiff1d(buckets, names), np.setdiff1d(names, buckets)
    if lacking.size or strange.size:
        raise ValueError(
            f"{owner} needs a condensed image of every bucket and of no other, got "
            f"none of {lacking[:8].tolist()} and some of {strange[:8].tolist()}. "
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
        raise ValueError(f"{owner} needs something to retain, got nothing.")
    return Reduced(joined, rows, len(joined["tokens"]) / retained)
