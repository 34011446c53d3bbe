# SPDX-License-Identifier: Apache-2.0
"""Images with labels: CIFAR-10, Fashion-MNIST, tables of your own, and what to forget.

    train = images.read("fashion_mnist", "train", folder)
    forget, retain = images.split_random(train, 0.1, seed=0)
    forget, retain = images.split_class(train, 2)

A table of images has `image` [n, H, W, C] (uint8, or float32 in [0, 1]), `tokens`
[n, 2] int32, whose second column is the label, and `mask` [n, 2]; models.vision says
why. Files are those the authors publish: IDX for Fashion-MNIST, the binary version of
CIFAR-10, or a subset of it as JPEG in an npz file. Nothing is unpickled.
"""

import gzip
import io
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxunlearn import _checks, _pixels
from jaxunlearn.data import table as tables
from jaxunlearn.data.benchmarks import official

SPLITS = ("train", "test")
_COLUMNS = {"image": "image", "label": "int"}


class Split(NamedTuple):
    """Two tables that share no row; `forget_rows` [k] says which were taken out."""

    forget: tables.Table
    retain: tables.Table
    forget_rows: np.ndarray


def table(images: np.ndarray, labels: np.ndarray, *, classes: int) -> tables.Table:
    """A table of images, once they are what they should be.

    Args:
        images: [n, H, W, C] or [n, H, W], uint8 in [0, 255] or float in [0, 1].
        labels: [n] whole numbers in [0, classes).
        classes: number of classes.
    Raises:
        ValueError: for another shape, values out of range or not finite, labels that
            are no class, or another number of labels. TypeError: for another dtype.
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
    _checks.whole("images.table", labels=labels)
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
    """The table with its images as float32 in [0, 1]."""
    pixels = np.asarray(images["image"])
    return {**images, "image": _pixels.as_float("images.as_float", pixels)}


def relabelled(images: tables.Table, labels: np.ndarray) -> tables.Table:
    """The table with other labels [n], whole numbers >= 0.

    Raises:
        ValueError: for another number of labels, or one below 0. TypeError: for labels
            that are not whole.
    """
    tokens, labels = np.array(images["tokens"]), np.asarray(labels)
    _checks.whole("images.relabelled", labels=labels)
    if labels.shape != tokens.shape[:1] or (labels < 0).any():
        raise ValueError(
            f"images.relabelled needs {len(tokens)} labels >= 0, got shape "
            f"{labels.shape} from {labels.min(initial=0)} on."
        )
    tokens[:, 1] = labels
    return {**images, "tokens": tokens}


def read(
    name: str,
    split: str,
    folder: str | os.PathLike | None = None,
    *,
    per_class: int | None = None,
) -> tables.Table:
    """A data set's table, in the order of its file.

    Args:
        name: "fashion_mnist" ([28, 28, 1]), "cifar10" or "cifar10_subset"
            ([32, 32, 3]).
        split: "train" or "test".
        folder: the folder above the data set's own; None takes JAXUNLEARN_DATA.
        per_class: the first so many images of each class; all if None.
    Raises:
        ValueError: for another name or split, a broken file, or a class with fewer
            images. FileNotFoundError: saying what is missing and where to get it.
    """
    _checks.one_of("images.read", tuple(BENCHMARKS), name=name)
    rows = official.read(BENCHMARKS[name], split, folder)
    pixels = np.stack([row["image"] for row in rows])
    labels = np.array([row["label"] for row in rows])
    if per_class is not None:
        keep = [first(labels, label, per_class) for label in range(10)]
        rows_kept = np.sort(np.concatenate(keep))
        pixels, labels = pixels[rows_kept], labels[rows_kept]
    return table(pixels, labels, classes=10)


def first(labels: np.ndarray, label: int, count: int) -> np.ndarray:
    """The numbers of the first `count` rows with a label."""
    found = np.flatnonzero(labels == label)
    if len(found) < count:
        raise ValueError(
            f"{count} images of class {label} were needed, got {len(found)}. Ask for "
            "fewer a class."
        )
    return found[:count]


def split_random(images: tables.Table, fraction: float, *, seed: int) -> Split:
    """Forgets a uniform random part of all rows.

    Raises:
        ValueError: if fraction is not in (0, 1), no row is chosen, or a class would
            have none left.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"images.split_random needs fraction in (0, 1), got fraction={fraction}."
        )
    count = tables.num_rows(images)
    order = np.random.default_rng(seed).permutation(count)
    return split_rows(images, order[: round(fraction * count)])


def split_class(images: tables.Table, label: int) -> Split:
    """Forgets every image of one class.

    Raises:
        ValueError: if there is no such class.
    """
    labels = labels_of(images)
    if label not in labels:
        raise ValueError(
            f"images.split_class needs a class of this table, one of "
            f"{_checks.listed(np.unique(labels).tolist(), 20)}, got {label}."
        )
    return _split(images, np.flatnonzero(labels == label))


def split_rows(images: tables.Table, rows: Iterable[int]) -> Split:
    """Forgets the rows of these numbers.

    Raises:
        ValueError: for no rows, a row there is not, one twice, or if a class would have
            no image left: that is `split_class`, and its measures differ.
    """
    labels, rows = labels_of(images), np.sort(np.asarray(rows, dtype=np.int64))
    if not rows.size or rows[0] < 0 or rows[-1] >= len(labels):
        came = f"{rows[0]} to {rows[-1]}" if rows.size else "none"
        raise ValueError(
            f"images.split_rows needs rows from 0 to {len(labels) - 1}, got {came}."
        )
    if (rows[1:] == rows[:-1]).any():
        raise ValueError("images.split_rows needs each row once, got one twice.")
    kept = np.setdiff1d(labels, np.delete(labels, rows))
    if kept.size:
        raise ValueError(
            f"The forget set holds every image of class {_checks.listed(kept.tolist())}"
            ", of which the retain set would have none. Take fewer rows, or "
            "images.split_class."
        )
    return _split(images, rows)


def _split(images, rows) -> Split:
    others = np.setdiff1d(np.arange(tables.num_rows(images)), rows)
    if not others.size:
        raise ValueError("Every row would be forgotten: nothing is left to retain.")
    return Split(tables.select(images, rows), tables.select(images, others), rows)


def _bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _rows(images: np.ndarray, labels: np.ndarray, path: Path) -> official.Rows:
    if len(images) != len(labels):
        raise ValueError(
            f"{path} needs as many labels as images, got {len(labels)} and "
            f"{len(images)}. Take the official files."
        )
    pairs = zip(images, labels.tolist(), strict=True)
    return [{"image": image, "label": label} for image, label in pairs]


def _idx(path: Path) -> official.Rows:
    """Images of an IDX file, and labels of the file beside it."""
    beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    return _rows(_idx_array(path, 3)[..., None], _idx_array(beside, 1), path)


def _idx_array(path: Path, axes: int) -> np.ndarray:
    content = _bytes(path)
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4")
    size = int(np.prod(shape, dtype=np.int64))
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) != start + size:
        raise ValueError(
            f"{path} needs an IDX file of bytes with {axes} axes, got a header of "
            f"{content[:4].hex()} and {len(content)} bytes. Take the official file."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar(path: Path) -> official.Rows:
    """Records of the binary version: a label, then red, green and blue planes."""
    train = path.name == "data_batch_1.bin"
    numbers = [path.with_name(f"data_batch_{i}.bin") for i in range(1, 6)]
    files = numbers if train else [path]
    content = np.frombuffer(b"".join(_bytes(file) for file in files), np.uint8)
    if content.size % 3073:
        raise ValueError(f"{path} needs records of 3073 bytes, got {content.size}.")
    records = content.reshape(-1, 3073)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return _rows(planes.transpose(0, 2, 3, 1), records[:, 0], path)


def _jpegs(split: str, path: Path) -> official.Rows:
    """One split of an npz file of concatenated JPEG files, their offsets and labels."""
    image = _checks.library("data.images", "PIL.Image", "vision")
    with np.load(path, allow_pickle=False) as file:
        names = [f"{split}_{part}" for part in ("jpeg", "offsets", "labels")]
        fix = "Take the file as it was made."
        _checks.has_keys(str(path), "arrays", names, file.files, fix)
        data, offsets, labels = (file[name] for name in names)
    ends = zip(offsets[:-1], offsets[1:], strict=True)
    found = [image.open(io.BytesIO(data[a:b].tobytes())) for a, b in ends]
    return _rows(np.stack([np.asarray(x.convert("RGB")) for x in found]), labels, path)


def _benchmark(name, files, parse, rows, home, licence, citation):
    made = {
        split: official.Table(
            files[split], _COLUMNS, rows[split], partial(parse, split)
        )
        for split in SPLITS
    }
    return official.Benchmark(name, made, home, licence, citation)


_KRIZHEVSKY = "A. Krizhevsky. Learning Multiple Layers of Features from Tiny Images. "
BENCHMARKS = {
    "fashion_mnist": _benchmark(
        "fashion_mnist",
        {
            "train": ("train-images-idx3-ubyte",),
            "test": ("t10k-images-idx3-ubyte", "test-images-idx3-ubyte"),
        },
        lambda split, path: _idx(path),
        {"train": None, "test": 10000},
        "https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
        "H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST: a Novel Image Dataset for "
        "Benchmarking Machine Learning Algorithms. 2017. "
        "https://arxiv.org/abs/1708.07747",
    ),
    "cifar10": _benchmark(
        "cifar10",
        {
            "train": ("cifar-10-batches-bin/data_batch_1.bin", "data_batch_1.bin"),
            "test": ("cifar-10-batches-bin/test_batch.bin", "test_batch.bin"),
        },
        lambda split, path: _cifar(path),
        {"train": 50000, "test": 10000},
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "none stated",
        _KRIZHEVSKY + "2009.",
    ),
    "cifar10_subset": _benchmark(
        "cifar10_subset",
        dict.fromkeys(SPLITS, ("train20k_test10k.npz",)),
        _jpegs,
        {"train": 20000, "test": 10000},
        "a subset of https://www.cs.toronto.edu/~kriz/cifar.html",
        "none stated; research use only",
        _KRIZHEVSKY + "2009.",
    ),
}
