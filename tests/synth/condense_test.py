# SPDX-License-Identifier: Apache-2.0
"""Condensed images match their buckets, and the reduced set has no forgotten image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import synth
from jaxunlearn.data import images
from jaxunlearn.models import vision
from jaxunlearn.typing import Model, Outputs

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def linear():
    """A model with a linear map from pixels to features, and a linear head."""

    def apply(params, batch, *, key=None, **_):
        flat = jnp.asarray(batch["image"]).reshape(len(batch["image"]), -1)
        out = flat.astype(jnp.float32) @ params["map"]
        return Outputs(jnp.stack([out, out], axis=1), {})

    maps = jax.random.normal(KEY, (16, 8)), jax.random.normal(KEY, (8, 3))
    model = Model(lambda key: None, apply, lambda p, h: h @ p["head"], {})
    return model, dict(zip(("map", "head"), maps, strict=True))


def pictures(rows=30, classes=3, seed=0):
    pixels = np.random.default_rng(seed).random((rows, *SHAPE))
    return images.table(pixels, np.arange(rows) % classes, classes=classes)


def test_clusters_are_within_classes_and_find_separated_groups():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 5)) * 20
    which = np.arange(90) % 6
    features = centres[which] + rng.normal(size=(90, 5)) * 0.1
    labels = which // 3
    buckets = synth.kmeans_per_class(features, labels, num_clusters=3, key=KEY)
    assert_array_equal(buckets // 3, labels)
    assert len(set(zip(buckets.tolist(), which.tolist(), strict=True))) == 6
    again = synth.kmeans_per_class(features, labels, num_clusters=3, key=KEY)
    assert_array_equal(buckets, again)


def test_a_cluster_for_every_row_is_a_bucket_for_every_row():
    features = np.random.default_rng(1).normal(size=(12, 3))
    buckets = synth.kmeans_per_class(
        features, np.arange(12) % 2, num_clusters=6, key=KEY
    )
    assert len(set(buckets.tolist())) == 12


def test_invalid_inputs_of_kmeans_are_refused():
    features = np.zeros((5, 2))
    with pytest.raises(ValueError, match="at least 3 rows in every class, got 2 in"):
        synth.kmeans_per_class(features, [0, 0, 0, 1, 1], num_clusters=3, key=KEY)
    with pytest.raises(ValueError, match=r"features \[n, D\] and labels"):
        synth.kmeans_per_class(features, [0, 0], num_clusters=1, key=KEY)
    with pytest.raises(ValueError, match="finite features .* got 10 not finite"):
        synth.kmeans_per_class(features * np.nan, [0] * 5, num_clusters=1, key=KEY)
    with pytest.raises(ValueError, match="a smallest label of -1"):
        synth.kmeans_per_class(features, [0, 0, -1, 0, 0], num_clusters=1, key=KEY)


def test_for_linear_features_the_plain_mean_is_already_exact():
    model, params = linear()
    table = pictures()
    buckets = (np.arange(30) % 3) * 10 + np.arange(30) // 3 % 4
    features = vision.features(model, params, table)
    made = synth.condense(
        model, params, table, features, buckets, steps=5, batch_size=16
    )
    assert_array_equal(made.buckets, np.unique(buckets))
    assert (made.losses < 1e-3).all()
    for bucket, image in zip(made.buckets, made.table["image"], strict=True):
        mean = table["image"][buckets == bucket].mean(0)
        assert_allclose(image, mean, atol=6e-3 * 10)
    assert_array_equal(images.labels_of(made.table), made.buckets // 10)


def test_a_bucket_of_one_image_starts_from_that_image():
    model, params = linear()
    table = pictures(3)
    features = vision.features(model, params, table)
    made = synth.condense(
        model, params, table, features, [5, 7, 9], steps=1, learning_rate=1e-9
    )
    assert_allclose(made.table["image"], table["image"], rtol=1e-6)
    assert_array_equal(made.buckets, [5, 7, 9])


def test_condensing_reduces_the_loss_and_groups_change_nothing():
    model = vision.make(vision.VisionConfig("mlp", shape=SHAPE, classes=3, width=0.1))
    params = model.init(KEY)
    table = pictures(30)
    features = vision.features(model, params, table)
    buckets = (np.arange(30) % 3) * 2 + (np.arange(30) > 8)
    how = dict(steps=40, learning_rate=0.01)
    before = synth.condense(
        model, params, table, features, buckets, steps=1, learning_rate=1e-9
    )
    after = synth.condense(model, params, table, features, buckets, **how)
    assert (after.losses < before.losses).all()
    alone = synth.condense(model, params, table, features, buckets, batch_size=1, **how)
    assert_allclose(alone.table["image"], after.table["image"], rtol=1e-3, atol=1e-4)
    found = vision.features(model, params, after.table)
    means = np.stack([np.asarray(features)[buckets == b].mean(0) for b in range(6)])
    assert_allclose(((found - means) ** 2).sum(1), after.losses, rtol=1e-3, atol=1e-6)


def test_inversion_draws_images_that_the_model_classifies_correctly():
    model, params = linear()
    table = pictures(30)
    labels = images.labels_of(table)
    table["image"] = (table["image"] * 0.2 + labels[:, None, None, None] * 0.3).astype(
        np.float32
    )
    small = dict(key=KEY, batch_size=30, widths=(16, 32))
    early = synth.invert(model, params, table, labels, steps=1, **small)
    late = synth.invert(model, params, table, labels, steps=150, **small)
    assert late.table["image"].shape == (3, *SHAPE)
    assert_array_equal(images.labels_of(late.table), [0, 1, 2])
    assert late.losses.mean() < 0.2 * early.losses.mean()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_reduced_set_has_no_forgotten_image(data):
    count = data.draw(st.integers(4, 30))
    drawn = st.lists(st.integers(0, 6), min_size=count, max_size=count)
    buckets = np.array(data.draw(drawn))
    some = st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1)
    forget = data.draw(some)
    pixels = np.arange(count * 4).reshape(count, 2, 2, 1) / (count * 4.0)
    table = images.table(pixels, buckets, classes=7)
    names = np.unique(buckets)
    marks = np.tile(np.float32(2.0 + names)[:, None, None, None], (1, 2, 2, 1))
    tokens = np.stack([0 * names, names], axis=1).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    made = {"image": marks, "tokens": tokens, "mask": mask}
    small = synth.Condensed(made, names, np.zeros(len(names)))
    reduced = synth.reduce_retain(table, buckets, small, forget)
    unsafe = {buckets[row] for row in forget}
    assert not set(reduced.rows.tolist()) & forget
    safe = len(names) - len(unsafe)
    first = reduced.table["image"][:safe, 0, 0, 0]
    assert_array_equal(first, [2.0 + name for name in names if name not in unsafe])
    assert_allclose(reduced.table["image"][safe:], table["image"][reduced.rows])
    # Every retained image is in the set, or the condensed image of its bucket is.
    for row in set(range(count)) - forget:
        assert (row in reduced.rows) == (buckets[row] in unsafe)
    assert reduced.ratio == len(reduced.table["mask"]) / (count - len(forget))


def test_the_ratio_matches_the_formula_for_equal_buckets():
    rng, size, share = np.random.default_rng(0), 10, 0.05
    buckets = np.repeat(np.arange(400), size)
    table = images.table(np.zeros((4000, 1, 1, 1)), 0 * buckets, classes=1)
    names = np.arange(400)
    made = {k: v[:400] for k, v in images.as_float(table).items()}
    small = synth.Condensed(made, names, np.zeros(400))
    forget = rng.permutation(4000)[: int(4000 * share)]
    got = synth.reduce_retain(table, buckets, small, forget).ratio
    assert_allclose(got, 1 - (1 - share) ** (size - 1) * (1 - 1 / size), atol=0.03)


def test_inconsistent_arguments_are_refused():
    model, params = linear()
    table = pictures(6)
    features = vision.features(model, params, table)
    with pytest.raises(ValueError, match="labels 0 and 1 in bucket 0"):
        synth.condense(model, params, table, features, np.zeros(6, int))
    with pytest.raises(ValueError, match="a bucket for each of 6 images"):
        synth.invert(model, params, table, np.zeros(5, int), key=KEY, steps=1)
    with pytest.raises(ValueError, match="features of all 6 images, got 5"):
        synth.condense(model, params, table, features[:5], np.arange(6))
    with pytest.raises(ValueError, match="finite features, got 8 others"):
        synth.condense(model, params, table, features.at[2].set(jnp.inf), np.arange(6))
    made = synth.condense(model, params, table, features, np.arange(6), steps=1)
    with pytest.raises(
        ValueError, match="a bucket for each of 6 images, got shape .5,."
    ):
        synth.reduce_retain(table, np.arange(5), made, [0])
    with pytest.raises(ValueError, match="forget_rows from 0 to 5"):
        synth.reduce_retain(table, np.arange(6), made, [6])
    with pytest.raises(ValueError, match="one condensed image for each bucket"):
        synth.reduce_retain(table, np.arange(6) + 1, made, [0])
