# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST and CIFAR-10 from the files their authors publish.

    train = image_sets.read("fashion_mnist", "train", folder)    # a table of images

Files are IDX for Fashion-MNIST, the binary version of CIFAR-10, or a subset of CIFAR-10
as JPEG in one npz file (which needs pillow: `pip install 'jaxunlearn[vision]'`). No
file is unpickled.
"""

import gzip
import io
import os
from functools import partial
from pathlib import Path

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import images
from jaxunlearn.data import table as tables
from jaxunlearn.data.benchmarks import official

SPLITS = ("train", "test")
_COLUMNS = {"image": "image", "label": "int"}


def read(
    name: str,
    split: str,
    folder: str | os.PathLike | None = None,
    *,
    per_class: int | None = None,
) -> tables.Table:
    """The images of one split as a table, in the order of their file.

    Args:
        name: "fashion_mnist" ([28, 28, 1]), "cifar10" or "cifar10_subset"
            ([32, 32, 3]).
        split: "train" or "test".
        folder: the folder that contains FOLDER/NAME/; None takes JAXUNLEARN_DATA.
        per_class: number of images of each class, the first in the file; None for all.
    Returns:
        A table of `data.images`.
    Raises:
        ValueError: for another name or split, a broken file, or a class with fewer
            images.
        FileNotFoundError: naming the missing file and where to get it.
    """
    _checks.one_of("image_sets.read", tuple(BENCHMARKS), name=name)
    rows = BENCHMARKS[name].read(split, folder)
    pixels = np.stack([row["image"] for row in rows])
    labels = np.array([row["label"] for row in rows])
    if per_class is not None:
        chosen = np.concatenate(
            [images.rows_of_class(labels, label, per_class) for label in range(10)]
        )
        chosen.sort()
        pixels, labels = pixels[chosen], labels[chosen]
    return images.table(pixels, labels, classes=10)


def _bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _rows(pixels: np.ndarray, labels: np.ndarray, path: Path) -> official.Rows:
    if len(pixels) != len(labels):
        raise ValueError(
            f"{path} needs as many labels as images, got {len(labels)} and "
            f"{len(pixels)}. Use the official files."
        )
    pairs = zip(pixels, labels.tolist(), strict=True)
    return [{"image": image, "label": label} for image, label in pairs]


def _idx(path: Path) -> official.Rows:
    """Images of an IDX file, and labels of the matching file in its folder."""
    labels = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    return _rows(_idx_array(path, 3)[..., None], _idx_array(labels, 1), path)


def _idx_array(path: Path, axes: int) -> np.ndarray:
    content = _bytes(path)
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">u4")
    size = int(np.prod(shape, dtype=np.int64))
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) != start + size:
        raise ValueError(
            f"{path} needs an IDX file of bytes with {axes} axes, got a header of "
            f"{content[:4].hex()} and {len(content)} bytes. Use the official file."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar(path: Path) -> official.Rows:
    """Records of the binary version: a label, then red, green and blue planes."""
    files = [path]
    if path.name == "data_batch_1.bin":  # the train split has five files
        files = [path.with_name(f"data_batch_{i}.bin") for i in range(1, 6)]
    content = np.frombuffer(b"".join(_bytes(file) for file in files), np.uint8)
    if content.size % 3073:
        raise ValueError(f"{path} needs records of 3073 bytes, got {content.size}.")
    records = content.reshape(-1, 3073)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return _rows(planes.transpose(0, 2, 3, 1), records[:, 0], path)


def _jpegs(split: str, path: Path) -> official.Rows:
    """One split of an npz file of concatenated JPEG files, their offsets and labels."""
    pillow = _checks.library(f"Reading {path}", "PIL.Image", "vision")
    with np.load(path, allow_pickle=False) as file:
        names = [f"{split}_{part}" for part in ("jpeg", "offsets", "labels")]
        fix = "Use the original file."
        _checks.has_keys(str(path), "arrays", names, file.files, fix)
        data, offsets, labels = (file[name] for name in names)
    ends = zip(offsets[:-1], offsets[1:], strict=True)
    found = [pillow.open(io.BytesIO(data[a:b].tobytes())) for a, b in ends]
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
