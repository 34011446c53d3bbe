# SPDX-License-Identifier: Apache-2.0
"""Attacks on image models: inversion, and the same relearning as for language."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn import attacks
from jaxunlearn.data import images
from jaxunlearn.models import vision

SHAPE = (4, 4, 1)
CONFIG = vision.VisionConfig("mlp", shape=SHAPE, classes=3, width=0.1)


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def blobs(rows=60):
    """Images of three classes, each with a different bright row."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 3
    pixels = rng.random((rows, *SHAPE)) * 0.3
    for label in range(3):
        pixels[labels == label, label] += 0.6
    return images.table(pixels, labels, classes=3)


def test_inversion_draws_the_feature_of_a_class_and_relearning_recovers_it():
    model = vision.make(CONFIG)
    params = model.init(jax.random.key(0))
    how = dict(steps=60, batch_size=20, learning_rate=1e-2)
    relearned, log = attacks.relearn(model, params, blobs(), **how)
    assert log[-1]["known/loss"] < 0.2 < log[0]["known/loss"]
    drawn, values = attacks.invert_classes(model, relearned, [2, 0], SHAPE, steps=80)
    assert drawn.shape == (2, *SHAPE) and drawn.min() >= 0 and drawn.max() <= 1
    assert (values < 0.1).all()
    for image, label in zip(drawn, (2, 0), strict=True):
        rows = image.mean((1, 2))[:3]
        assert rows.argmax() == label
    features = vision.features(model, relearned, {"image": drawn})
    logits = model.unembed(relearned, features)
    assert_array_equal(jnp.argmax(logits, axis=1), [2, 0])
    free, _ = attacks.invert_classes(model, relearned, [1], SHAPE, steps=80, clip=False)
    assert free.min() < 0
    with pytest.raises(ValueError, match="at least one class"):
        attacks.invert_classes(model, relearned, [], SHAPE)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"classes from 0 to 2, .* got {wrong}"):
            attacks.invert_classes(model, relearned, [0, wrong], SHAPE)
