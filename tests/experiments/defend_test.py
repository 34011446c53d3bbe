# SPDX-License-Identifier: Apache-2.0
"""Condensed models and defences on made-up images: each runs, resumes and is told."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("ml_collections")
from experiments.condensation import defend
from tests.experiments.vision_test import tiny_world


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_otsu_cuts_where_the_two_heaps_part():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0, 1, 300), rng.normal(9, 1, 80)
    cut = defend.otsu(np.concatenate([high, low]))
    assert low.max() <= cut < high.min()
    values = rng.exponential(size=40).round(1)

    def between(v):
        a, b = values[values <= v], values[values > v]
        return len(a) * len(b) * (a.mean() - b.mean()) ** 2 if len(b) else -1.0

    assert between(defend.otsu(values)) == pytest.approx(max(map(between, values)))
    with pytest.raises(ValueError, match="two finite numbers"):
        defend.otsu(np.array([1.0, np.nan]))


def test_rows_held_firmly_leave_some_of_every_class():
    labels, each = np.repeat([0, 1], 4), np.array([1, 2, 1, 1.5, 1, 9, 9, 9.5])
    assert defend.held(labels, each, 2).tolist() == [0, 2, 4]


def test_the_overfitting_metric_of_rows_is_that_of_their_gradients():
    from experiments.vision import attacks
    from jaxunlearn import metrics, trees
    from jaxunlearn.data import table
    from jaxunlearn.models import vision

    world = tiny_world()
    world = world.__class__(
        world.config, world.model, table.select(world.train, np.arange(6)), world.test
    )
    params = world.model.init(jax.random.key(0))
    found = attacks.overfitting(world, params, world.train)
    assert found.shape == (6,)
    half, rest = trees.split(params, vision.TRAINABLE)

    def loss(half, row):
        own, one = trees.merge(half, rest), table.select(world.train, np.array([row]))
        logits = world.model.unembed(own, vision.features(world.model, own, one))
        return -jax.nn.log_softmax(logits)[0, one["tokens"][0, 1]]

    for row in range(6):
        pair = jax.value_and_grad(loss)(half, row)
        assert found[row] == pytest.approx(
            float(metrics.overfitting_metric(*pair)), rel=1e-4
        )


def test_all_three_run_go_on_and_are_told(tmp_path):
    world, file = tiny_world(epochs=4), tmp_path / "lines.jsonl"
    lines = defend.run(world, file)
    assert [line["key"] for line in lines] == [f"{x} 0" for x in defend.EXPERIMENTS]
    models = {line["experiment"]: line["models"] for line in lines}
    assert set(models["inversion"]) == {"original", "condensation", "retrained"}
    assert 0 < models["membership"]["defended"]["forgotten share"] < 1
    assert set(models["condensed"]["after"]) == {"retain", "forget", "test", "M1"}
    for each in models.values():
        for numbers in each.values():
            assert np.isfinite(list(numbers.values())).all()
    part = file.read_text().splitlines(keepends=True)
    file.write_text("".join(part[:-1]) + part[-1][:30])
    assert defend.run(world, file) == lines
    defend.write(lines, world.config, tmp_path / "defend")
    page = (tmp_path / "defend.md").read_text()
    value = models["membership"]["original"]["AUC"]
    assert f"| original | {value:.3f} |" in page and "## Condensed (1 seed)" in page
    assert len(json.loads((tmp_path / "defend.json").read_text())["runs"]) == 3
