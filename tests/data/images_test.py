# SPDX-License-Identifier: Apache-2.0
"""Tables of images, from the authors' files, and their splits."""

import gzip
import io
import struct

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn.data import images
from jaxunlearn.data.benchmarks import image_sets

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1), np.uint8)
LABELS = np.arange(40) % 4


def idx(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "fashion_mnist"
    place.mkdir()
    images_file = place / "train-images-idx3-ubyte.gz"
    images_file.write_bytes(gzip.compress(idx(PIXELS[..., 0])))
    (place / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    return tmp_path


def small():
    return images.table(PIXELS, LABELS, classes=4)


def test_idx_files_are_read_as_published(folder):
    found = image_sets.read("fashion_mnist", "train", folder)
    assert_array_equal(found["image"], PIXELS)
    assert_array_equal(images.labels_of(found), LABELS)
    assert found["tokens"].dtype == np.int32 and found["mask"].all()


def test_a_broken_idx_file_is_named(folder):
    path = folder / "fashion_mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(LABELS)[:-1]))
    with pytest.raises(ValueError, match="train-labels.*needs an IDX file"):
        image_sets.read("fashion_mnist", "train", folder)
    path.write_bytes(gzip.compress(idx(LABELS[:-1])))
    with pytest.raises(ValueError, match="as many labels as images, got 39 and 40"):
        image_sets.read("fashion_mnist", "train", folder)


def test_cifars_binary_records_and_jpegs_are_read(tmp_path, monkeypatch):
    Image = pytest.importorskip("PIL.Image")
    planes = np.random.default_rng(1).integers(0, 256, (10, 3, 32, 32), np.uint8)
    records = np.concatenate(
        [np.arange(10, dtype=np.uint8)[:, None], planes.reshape(10, -1)], axis=1
    )
    place = tmp_path / "cifar10"
    place.mkdir()
    (place / "test_batch.bin").write_bytes(records.tobytes())
    with pytest.raises(ValueError, match="needs 10000 rows, got 10"):
        image_sets.read("cifar10", "test", tmp_path)
    rows = image_sets.BENCHMARKS["cifar10"].read("test", tmp_path, check=False)
    assert [row["label"] for row in rows] == list(range(10))
    assert_array_equal(rows[3]["image"], planes[3].transpose(1, 2, 0))

    files, flat = [], np.full((2, 32, 32, 3), [[[[10]]], [[[200]]]], np.uint8)
    for picture in flat:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG")
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    place = tmp_path / "cifar10_subset"
    place.mkdir()
    np.savez(
        place / "train20k_test10k.npz",
        test_jpeg=np.concatenate(files),
        test_offsets=np.cumsum([0, *map(len, files)]),
        test_labels=np.uint8([7, 2]),
    )
    subset = image_sets.BENCHMARKS["cifar10_subset"]
    rows = subset.read("test", tmp_path, check=False)
    assert [row["label"] for row in rows] == [7, 2]
    assert abs(rows[1]["image"].astype(int) - 200).max() <= 2


def test_records_of_tensorflow_datasets_are_the_readers_rows(folder, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from jaxunlearn.data.benchmarks import builders

    cache = tmp_path / "cache"
    found = builders.source("local_fashion_mnist", "train", folder, cache=cache)
    assert len(found) == 40 and found[5]["label"] == 1
    assert_array_equal(found[5]["image"], PIXELS[5])


def test_a_builder_of_tensorflow_datasets_becomes_a_table(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    from types import SimpleNamespace

    from jaxunlearn.data.benchmarks import builders

    class Builder:
        info = SimpleNamespace(features={"label": SimpleNamespace(num_classes=4)})
        ready = False

        def download_and_prepare(self):
            self.ready = True

        def as_data_source(self, split):
            assert self.ready and split == "test"
            pairs = zip(PIXELS, LABELS, strict=True)
            return [{"image": image, "label": label} for image, label in pairs]

    monkeypatch.setattr(tfds, "builder", lambda name, **options: Builder())
    found = builders.tfds_images("fashion_mnist", "test")
    assert_array_equal(found["image"], PIXELS)
    assert_array_equal(images.labels_of(found), LABELS)


@pytest.mark.parametrize(
    ("pixels", "labels", "error", "message"),
    [
        (PIXELS[0, 0], LABELS, ValueError, r"needs images \[n, H, W, C\]"),
        (PIXELS, LABELS[:-1], ValueError, r"labels \[n\]"),
        (PIXELS.astype(np.float32), LABELS, ValueError, r"floats in \[0, 1\], got 0 "),
        (np.full((4, 2, 2), np.nan), LABELS[:4], ValueError, "got nan to nan"),
        (PIXELS.astype(np.int32), LABELS, TypeError, "got int32"),
        (PIXELS, LABELS + 1, ValueError, "labels from 0 to 3, got 1 to 4"),
        (PIXELS, LABELS / 2, TypeError, "labels of dtype float64"),
    ],
)
def test_invalid_images_are_refused(pixels, labels, error, message):
    with pytest.raises(error, match=message):
        images.table(pixels, labels, classes=4)


def test_a_random_split_is_a_partition_that_depends_on_the_seed():
    full = small()
    one, same, other = (images.split_random(full, 0.25, seed=s) for s in (0, 0, 1))
    assert len(one.forget["image"]) == 10 and len(one.retain["image"]) == 30
    assert_array_equal(one.forget_rows, same.forget_rows)
    assert (one.forget_rows != other.forget_rows).any()
    assert_array_equal(one.forget["image"], PIXELS[one.forget_rows])
    both = np.concatenate([one.forget["image"], one.retain["image"]])
    assert sorted(map(bytes, both)) == sorted(map(bytes, PIXELS))


def test_a_class_split_contains_exactly_the_class():
    split = images.split_class(small(), 2)
    assert set(images.labels_of(split.forget)) == {2}
    assert set(images.labels_of(split.retain)) == {0, 1, 3}


def test_impossible_splits_are_refused():
    full = small()
    with pytest.raises(ValueError, match="one of 0, 1, 2, 3, got 7"):
        images.split_class(full, 7)
    with pytest.raises(ValueError, match="every image of class 1"):
        images.split_rows(full, np.flatnonzero(LABELS == 1))
    with pytest.raises(ValueError, match=r"fraction in \(0, 1\), got fraction=1.5"):
        images.split_random(full, 1.5, seed=0)
    with pytest.raises(ValueError, match="got none"):
        images.split_random(full, 0.001, seed=0)
    with pytest.raises(ValueError, match="each row once"):
        images.split_rows(full, [3, 3])
    with pytest.raises(ValueError, match="rows from 0 to 39, got 2 to 40"):
        images.split_rows(full, [2, 40])
    with pytest.raises(ValueError, match="every row is to forget"):
        images.split_class(images.table(PIXELS, 0 * LABELS, classes=1), 0)


def test_as_float_and_relabelled_change_nothing_else():
    full = small()
    wide = images.as_float(full)
    assert wide["image"].dtype == np.float32 and wide["image"].max() <= 1
    assert images.as_float(wide)["image"] is wide["image"]
    other = images.relabelled(full, 3 - LABELS)
    assert_array_equal(images.labels_of(other), 3 - LABELS)
    assert_array_equal(images.labels_of(full), LABELS)
    with pytest.raises(TypeError, match="labels of dtype"):
        images.relabelled(full, LABELS * 0.5)
    with pytest.raises(ValueError, match=f"needs {len(LABELS)} labels >= 0"):
        images.relabelled(full, LABELS[:-1])
    with pytest.raises(ValueError, match="minimum -1"):
        images.relabelled(full, LABELS - 1)
