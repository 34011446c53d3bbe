# SPDX-License-Identifier: Apache-2.0
"""Tables of labelled images, and splits of them into forget and retain sets.

    train = data.images.table(pixels, labels, classes=10)
    train = data.image_sets.read("fashion_mnist", "train", folder)
    forget, retain, rows = data.images.split_random(train, 0.1, seed=0)
    forget, retain, rows = data.images.split_class(train, 2)

A table of images has the columns `image` [n, H, W, C] (uint8, or float32 in [0, 1]),
`tokens` [n, 2] int32, whose second column is the label, and `mask` [n, 2] bool: an
image is a sequence of two tokens, see models.vision.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxunlearn import _checks, _pixels
from jaxunlearn.data import table as tables


class Split(NamedTuple):
    """Two disjoint tables, and the indices [k] int of the rows to forget."""

    forget: tables.Table
    retain: tables.Table
    forget_rows: np.ndarray


def table(images: np.ndarray, labels: np.ndarray, *, classes: int) -> tables.Table:
    """A table of images and labels, after checking both.

    Args:
        images: [n, H, W, C] or [n, H, W], uint8 in [0, 255] or float in [0, 1].
        labels: [n] int in [0, classes).
        classes: number of classes.
    Raises:
        ValueError: for another shape, values out of range or not finite, labels out of
            range, or another number of labels.
        TypeError: for another dtype.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or labels.shape != images.shape[:1] or not images.size:
        raise ValueError(
            "images.table needs images [n, H, W, C] and labels [n], n >= 1, got shapes "
            f"{images.shape} and {labels.shape}. Channels come last."
        )
    if np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32)
    _pixels.check("images.table", {"image": images})
    _checks.integers("images.table", labels=labels)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"images.table needs labels from 0 to {classes - 1}, got {labels.min()} to "
            f"{labels.max()}. Is classes={classes} right?"
        )
    tokens = np.stack([np.zeros_like(labels), labels], axis=1).astype(np.int32)
    return {"image": images, "tokens": tokens, "mask": np.ones(tokens.shape, bool)}


def labels_of(images: tables.Table) -> np.ndarray:
    """The labels [n] of a table of images."""
    return np.asarray(images["tokens"])[:, 1]


def as_float(images: tables.Table) -> tables.Table:
    """The table with float32 images in [0, 1]."""
    pixels = np.asarray(images["image"])
    return {**images, "image": _pixels.as_float("images.as_float", pixels)}


def relabelled(images: tables.Table, labels: np.ndarray) -> tables.Table:
    """The table with other labels, [n] int >= 0.

    Raises:
        ValueError: for another number of labels, or a negative label.
        TypeError: for labels that are not integers.
    """
    tokens, labels = np.array(images["tokens"]), np.asarray(labels)
    _checks.integers("images.relabelled", labels=labels)
    if labels.shape != tokens.shape[:1] or (labels < 0).any():
        raise ValueError(
            f"images.relabelled needs {len(tokens)} labels >= 0, got shape "
            f"{labels.shape} with minimum {labels.min(initial=0)}."
        )
    tokens[:, 1] = labels
    return {**images, "tokens": tokens}


def rows_of_class(labels: np.ndarray, label: int, num_rows: int) -> np.ndarray:
    """Indices of the first `num_rows` rows of a class.

    Raises:
        ValueError: if the class has fewer rows.
    """
    found = np.flatnonzero(labels == label)
    if len(found) < num_rows:
        raise ValueError(
            f"num_rows={num_rows} images of class {label} are needed, got "
            f"{len(found)}. Use fewer images per class."
        )
    return found[:num_rows]


def split_random(images: tables.Table, fraction: float, *, seed: int) -> Split:
    """Splits off a uniformly random part of all rows to forget.

    Args:
        images: a table of images.
        fraction: part of the rows to forget, in (0, 1).
        seed: integer >= 0.
    Raises:
        ValueError: if fraction is not in (0, 1), no row is drawn, or a class would have
            no row left.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"images.split_random needs fraction in (0, 1), got fraction={fraction}."
        )
    rows = tables.num_rows(images)
    order = np.random.default_rng(seed).permutation(rows)
    return split_rows(images, order[: round(fraction * rows)])


def split_class(images: tables.Table, label: int) -> Split:
    """Splits off every image of one class to forget.

    Raises:
        ValueError: if no image has this label, or all have.
    """
    labels = labels_of(images)
    if label not in labels:
        raise ValueError(
            f"images.split_class needs a class of this table, one of "
            f"{_checks.listed(np.unique(labels).tolist(), 20)}, got {label}."
        )
    return _split(images, np.flatnonzero(labels == label))


def split_rows(images: tables.Table, rows: Iterable[int]) -> Split:
    """Splits off the rows with these indices to forget.

    Raises:
        ValueError: for no rows, an index out of range, a repeated index, or if a class
            would have no image left: that is `split_class`, which is evaluated
            differently.
    """
    labels, rows = labels_of(images), np.sort(np.asarray(rows, dtype=np.int64))
    if not rows.size or rows[0] < 0 or rows[-1] >= len(labels):
        came = f"{rows[0]} to {rows[-1]}" if rows.size else "none"
        raise ValueError(
            f"images.split_rows needs rows from 0 to {len(labels) - 1}, got {came}."
        )
    if (rows[1:] == rows[:-1]).any():
        raise ValueError("images.split_rows needs each row once, got one repeated.")
    lost = np.setdiff1d(labels, np.delete(labels, rows))
    if lost.size:
        raise ValueError(
            f"The forget set has every image of class {_checks.listed(lost.tolist())}, "
            "so the retain set would have none. Use fewer rows, or images.split_class."
        )
    return _split(images, rows)


def _split(images, rows) -> Split:
    others = np.setdiff1d(np.arange(tables.num_rows(images)), rows)
    if not others.size:
        raise ValueError("A split needs rows to retain, but every row is to forget.")
    return Split(tables.select(images, rows), tables.select(images, others), rows)
