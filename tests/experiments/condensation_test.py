# SPDX-License-Identifier: Apache-2.0
"""The condensation paper's further experiments on made-up images."""

import jax
import numpy as np
import pytest

pytest.importorskip("ml_collections")
from experiments.condensation import figures, run
from tests.experiments.vision_test import ledger, tiny_world


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_otsu_cuts_where_the_two_heaps_part():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0, 1, 300), rng.normal(9, 1, 80)
    cut = run.otsu(np.concatenate([high, low]))
    assert low.max() <= cut < high.min()
    values = rng.exponential(size=40).round(1)

    def between(v):
        a, b = values[values <= v], values[values > v]
        return len(a) * len(b) * (a.mean() - b.mean()) ** 2 if len(b) else -1.0

    assert between(run.otsu(values)) == pytest.approx(max(map(between, values)))
    with pytest.raises(ValueError, match="two finite numbers"):
        run.otsu(np.array([1.0, np.nan]))


def test_rows_held_firmly_leave_some_of_every_class():
    labels, each = np.repeat([0, 1], 4), np.array([1, 2, 1, 1.5, 1, 9, 9, 9.5])
    assert run.firmly_learned(labels, each, 2).tolist() == [0, 2, 4]


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
        params = trees.merge(half, rest)
        one = table.select(world.train, np.array([row]))
        logits = world.model.unembed(params, vision.features(world.model, params, one))
        return -jax.nn.log_softmax(logits)[0, one["tokens"][0, 1]]

    for row in range(6):
        pair = jax.value_and_grad(loss)(half, row)
        assert found[row] == pytest.approx(
            float(metrics.overfitting_metric(*pair)), rel=1e-4
        )


@pytest.mark.slow
def test_all_three_experiments_run_and_are_drawn(tmp_path):
    world = tiny_world(epochs=2, tune_epochs=1)
    file = tmp_path / "lines.jsonl"
    lines = run.experiments(world, ledger(world, file))
    assert [line["key"] for line in lines] == [f"{x} 0" for x in run.EXPERIMENTS]
    models = {line["experiment"]: line["models"] for line in lines}
    assert set(models["inversion"]) == {"original", "condensation", "retrained"}
    assert 0 < models["membership"]["defended"]["forgotten share"] < 1
    assert set(models["condensed"]["after"]) == {"retain", "forget", "test", "M1"}
    for each in models.values():
        for numbers in each.values():
            assert np.isfinite(list(numbers.values())).all()
    assert run.experiments(world, ledger(world, file)) == lines
    content = {"about": {"config": world.config.to_dict()}, "runs": lines}
    results = {"vision": {}, "condensation": {"fashion_mnist": content}}
    page = "\n".join(figures.readme(results))
    value = models["membership"]["original"]["AUC"]
    assert f"| original | {value:.3f}" in page and "### Condensed (1 seed)" in page
