# SPDX-License-Identifier: Apache-2.0
"""The comparison on made-up images: every method, interrupted, resumed and drawn."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("ml_collections")
from experiments.vision import attacks, compare, figures, methods
from experiments.vision import world as worlds
from jaxunlearn.data import images
from jaxunlearn.models import vision

SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def blobs(each, seed):
    """Ten classes: a bright pair of rows or columns, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(10), each)
    pixels = rng.random((len(labels), *SHAPE)) * 0.6
    for label in range(10):
        line = slice(label % 5, label % 5 + 2)
        place = (line, slice(None)) if label < 5 else (slice(None), line)
        pixels[(labels == label).nonzero()[0][:, None, None], *_grid(place)] += 0.4
    order = rng.permutation(len(labels))
    return images.table(pixels[order], labels[order], classes=10)


def _grid(place):
    rows, columns = (np.arange(8)[each] for each in place)
    return rows[:, None], columns[None]


def tiny_world(**settings):
    config = worlds.defaults()
    config.update(
        name="blobs",
        train=12,
        test=8,
        family="mlp",
        width=0.1,
        epochs=8,
        tune=2,
        batch=20,
        lr=1e-2,
        seeds=(0,),
        per_bucket=4,
        kept=2,
        gan_steps=3,
        gan_batch=8,
    )
    config.update(settings)
    net = vision.VisionConfig("mlp", shape=SHAPE, width=0.1)
    return worlds.World(config, vision.make(net), blobs(12, 0), blobs(8, 1))


def test_an_interrupted_comparison_goes_on_and_is_drawn(tmp_path):
    world, file = tiny_world(epochs=4), tmp_path / "lines.jsonl"
    names = ("retrain", "SSD", "condensation")
    known = {name: methods.METHODS[name] for name in names}
    compare.compare(world, file, known={"retrain": methods.retrain})
    with file.open("a") as out:
        out.write('{"key": "broken')
    seen = []
    lines = compare.compare(
        world, file, known=known, done=lambda lines, _: seen.append(len(lines))
    )
    assert len(lines) == 8 == seen[-1] and all(line["finite"] for line in lines)
    by = {line["key"]: line for line in lines}
    assert by["retrain class 0"]["forget"] == 0.0
    assert by["original random 0"]["retain"] > 0.3
    assert by["condensation class 0"]["ratio"] < by["condensation random 0"]["ratio"]
    assert compare.compare(world, file, known={}) == lines
    with pytest.raises(ValueError, match="Move it away to begin anew"):
        compare.compare(tiny_world(tune=3), file)

    place = tmp_path / "blobs"
    figures.write(lines, world.config, place)
    text = place.with_suffix(".md").read_text()
    assert text.count("| condensation |") == 2
    whole = json.loads(place.with_suffix(".json").read_text())
    gaps = {(r["setting"], r["method"]): r["gap"] for r in whole["methods"]}
    assert gaps["random", "retrain"] == [0.0, None]
    assert place.with_suffix(".png").stat().st_size > 1000


def test_what_the_numbers_say_by_hand():
    def row(method, gap, forget, seconds, offline=0.0):
        own = {"setting": "random", "method": method, "gap": [gap, 0.01]}
        own |= {"forget": [forget, 0.0], "seconds": [seconds, 0.0]}
        return own | {"offline": [offline, 0.0], "seeds": 3}

    rows = [row("original", 0.10, 1.0, 4.0), row("retrain", 0.0, 0.7, 4.0)]
    rows += [row("condensation", 0.05, 0.8, 1.0, 2.0), row("multi-GAN", 0.095, 0.5, 8)]
    nearest, condensed, drawn = figures.answers(rows)
    assert "are condensation (5.0 ± 1.0), multi-GAN" in nearest
    assert "nearer than the original; forget accuracy is 10.0 points above" in condensed
    assert "0.25 times" in condensed and "0.75 times with" in condensed
    assert "as near as the original" in drawn and "20.0 points below" in drawn
    assert figures.answers(rows[1:]) == []


@pytest.mark.parametrize(
    "name", [n for n in methods.METHODS if n not in ("retrain", "SSD", "condensation")]
)
def test_every_other_method_moves_the_model(name):
    world = tiny_world(tune=1)
    params = world.model.init(jax.random.key(0))
    case = methods.Case(world, worlds.split(world, "random", 0), params, 0, {})
    new, seconds, offline, _ = methods.METHODS[name](case)
    assert seconds > 0 and (offline > 0) == (name == "multi-GAN")
    pairs = jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), params, new))
    assert any(map(bool, pairs))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


def test_pictures_are_drawn_of_what_was_made(tmp_path):
    world = tiny_world()
    params = world.model.init(jax.random.key(0))
    shared = {}
    case = methods.Case(world, worlds.split(world, "random", 0), params, 0, shared)
    small, buckets, seconds = methods.condense(case)
    assert seconds > 0 and len(buckets) == 120 and methods.condense(case)[0] is small
    figures.pictures(
        shared | {"drawn": {"forget": small.table["image"]}}, tmp_path / "x"
    )
    assert (tmp_path / "x_pictures.png").stat().st_size > 1000


def test_a_model_that_never_saw_the_rows_is_not_attacked():
    rng = np.random.default_rng(0)

    def scores(size, scale):
        loss = rng.exponential(scale, size)
        return {"loss": loss, "entropy": rng.exponential(scale, size)}

    same = {"forget": 1.0, "calibration": 1.0, "new": 1.0, "retain": 0.2}
    found = attacks.attacks({k: scores(400, v) for k, v in same.items()}, seed=0)
    assert abs(found["m1"] - 0.5) < 0.1 and abs(found["m4"] - 0.5) < 0.07
    known = attacks.attacks(
        {k: scores(400, v) for k, v in (same | {"forget": 0.2}).items()}, seed=0
    )
    assert known["m1"] > 0.65 and known["m4"] > 0.65
    assert known["m2"] > found["m2"] + 0.2 and known["m3"] > found["m3"] + 0.2
    assert known["m5"] > found["m5"]


def test_um_is_low_where_forgotten_rows_are_the_retained_ones():
    world = tiny_world()
    params = world.model.init(jax.random.key(0))
    half = worlds.split(world, "random", 0)
    same = half._replace(forget=half.retain)
    assert attacks.unlearning_metric(world, params, same) < 1e-3
    assert attacks.unlearning_metric(world, params, half) > 1e-2
    assert attacks.overfitting_metric(world, params, half.forget, rows=4) > 0
