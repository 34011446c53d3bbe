# SPDX-License-Identifier: Apache-2.0
"""Every function refuses invalid images and arguments before it computes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import synth
from jaxunlearn.data import images
from jaxunlearn.models import gan as gans
from jaxunlearn.models import vision

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
CONFIG = vision.VisionConfig("mlp", shape=SHAPE, classes=3, width=0.1)
BUCKETS = np.arange(6)


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def made():
    """A model of 13 features, six images in six buckets, and condensed images."""
    model = vision.make(CONFIG)
    params = model.init(KEY)
    rows = images.table(np.full((6, *SHAPE), 0.5), BUCKETS % 3, classes=3)
    features = vision.features(model, params, rows)
    small = synth.Condensed(rows, BUCKETS, np.zeros(6))
    net = gans.make(gans.GanConfig(SHAPE, latent=2, width=2, ups=1))
    return SimpleNamespace(
        model=model, params=params, rows=rows, features=features, small=small, net=net
    )


def condense(made, rows, features=None, buckets=BUCKETS):
    features = made.features if features is None else features
    return synth.condense(made.model, made.params, rows, features, buckets, steps=1)


def invert(made, rows):
    how = dict(key=KEY, steps=1, widths=(2,))
    return synth.invert(made.model, made.params, rows, BUCKETS, **how)


def fit_gans(made, rows):
    return synth.fit_gans(made.net, {"forget": rows}, key=KEY, steps=1, batch_size=2)


def reduce_retain(made, rows, small=None, buckets=BUCKETS, forget=(0,)):
    return synth.reduce_retain(rows, buckets, small or made.small, forget)


TAKE_IMAGES = {
    "condense": condense,
    "invert": invert,
    "fit_gans": fit_gans,
    "reduce_retain": reduce_retain,
    "pseudo_label": lambda made, rows: synth.pseudo_label(
        made.model, made.params, rows["image"]
    ),
    "build_mixture": lambda made, rows: synth.build_mixture(
        forget=rows, retain=made.rows, num_classes=3
    ),
    "build_mixture drawn": lambda made, rows: synth.build_mixture(
        forget=made.rows, retain=made.rows, drawn_forget=rows, num_classes=3
    ),
}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda x: x.astype(np.int32), TypeError, "uint8 pixels .* got int32"),
        (lambda x: x * 255, ValueError, r"floats in \[0, 1\], got 127.5 to 127.5"),
        (lambda x: x * np.float32(np.nan), ValueError, r"floats in \[0, 1\], got nan"),
        (lambda x: x[..., 0], ValueError, r"images \[n, .*got shape \(6, 4, 4\)"),
        (lambda x: x[:, :, :2], ValueError, r"4, \d, 1\].* shape \(\d+, 4, \d, 1\)"),
    ],
)
@pytest.mark.parametrize("name", TAKE_IMAGES)
def test_images_of_another_dtype_range_or_shape(made, name, change, error, says):
    with pytest.raises(error, match=says):
        TAKE_IMAGES[name](made, {**made.rows, "image": change(made.rows["image"])})


@pytest.mark.parametrize("name", TAKE_IMAGES)
@pytest.mark.slow
def test_uint8_and_float_images_are_accepted(made, name):
    rows = {**made.rows, "image": np.full((6, *SHAPE), 51, np.uint8)}
    TAKE_IMAGES[name](made, rows)
    TAKE_IMAGES[name](made, images.as_float(rows))


HALF = np.arange(6) / 2
OTHERS = {
    "features of another width": (
        lambda made: condense(made, made.rows, made.features[:, :1]),
        ValueError,
        r"features \[n, 13\], .* got shape \(6, 1\)",
    ),
    "fractional buckets": (
        lambda made: condense(made, made.rows, buckets=HALF),
        TypeError,
        "buckets of dtype float64",
    ),
    "buckets below zero": (
        lambda made: condense(made, made.rows, buckets=BUCKETS - 1),
        ValueError,
        "buckets >= 0, got -1",
    ),
    "a condensed image of no bucket": (
        lambda made: reduce_retain(made, made.rows, buckets=BUCKETS % 3),
        ValueError,
        r"surplus ones for \[3, 4, 5\]",
    ),
    "condensed images of another shape": (
        lambda made: reduce_retain(
            made,
            made.rows,
            made.small._replace(
                table={**made.rows, "image": np.zeros((6, 2, 2, 1), np.float32)}
            ),
        ),
        ValueError,
        r"images \[n, 4, 4, 1\].* got shape \(6, 2, 2, 1\)",
    ),
    "condensed images that are not as many as their buckets": (
        lambda made: reduce_retain(
            made, made.rows, made.small._replace(buckets=np.arange(6).repeat(2))
        ),
        ValueError,
        "bucket for each of 6 condensed images, got 12",
    ),
    "fractional rows to forget": (
        lambda made: reduce_retain(made, made.rows, forget=[0.5]),
        TypeError,
        "forget_rows of dtype float64",
    ),
    "fractional labels to cluster": (
        lambda made: synth.kmeans_per_class(np.eye(6), HALF, num_clusters=1, key=KEY),
        TypeError,
        "labels of dtype float64",
    ),
    "fractional labels to invert": (
        lambda made: synth.invert_labels(HALF, 3),
        TypeError,
        "labels of dtype float64",
    ),
    "no images": (
        lambda made: fit_gans(made, {"tokens": made.rows["tokens"]}),
        KeyError,
        "columns 'image'",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_invalid_arguments_are_refused(made, case):
    call, error, says = OTHERS[case]
    with pytest.raises(error, match=says):
        call(made)


def test_jax_arrays_are_accepted_as_images(made):
    rows = {**made.rows, "image": jnp.asarray(made.rows["image"])}
    assert condense(made, rows).table["image"].shape == (6, *SHAPE)
