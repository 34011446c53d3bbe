# SPDX-License-Identifier: Apache-2.0
"""The stop rules of the pruning loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import edits
from tests import tiny


def dead(params):
    kernel = params["blocks"]["mlp"]["down"]["kernel"]
    return float(jnp.mean(jnp.all(kernel == 0, axis=-1)))


def run(**settings):
    model, params = tiny.tiny_model()
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.random((3, model.sites["mlp"].units)))
    accuracies = lambda p: (0.9 - 2 * dead(p), 0.8 - dead(p))  # noqa: E731
    settings = {"fraction": 0.125, "scores": lambda p: scores} | settings
    settings = {"evaluate": accuracies} | settings
    return edits.prune_loop(model, params, **settings)


def test_it_stops_before_the_retain_accuracy_falls_too_far():
    got = run(max_retain_drop=0.3)
    assert float(jnp.mean(got.removed)) == 0.25 == dead(got.params)
    assert [round(r, 3) for _, r in got.history] == [0.8, 0.675, 0.55, 0.425]


def test_it_stops_at_max_fraction_and_may_remove_nothing():
    got = run(max_fraction=0.5)
    assert dead(got.params) == 0.5 and len(got.history) == 5
    none = run(max_retain_drop=0.01)
    assert none.removed is None and dead(none.params) == 0


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"fraction": 1.5}, "at most 1"),
        ({"fraction": 0.01}, "at least one of 72 units per step, got fraction=0.01"),
        ({"max_retain_drop": -0.1}, "max_retain_drop"),
        ({"evaluate": lambda p: (0.5, float("nan"))}, "finite"),
        ({"scores": lambda p: jnp.full((3, 24), jnp.nan)}, "NaN"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        run(**settings)
