# SPDX-License-Identifier: Apache-2.0
"""The comparison on made-up images: every method, interrupted, resumed and drawn."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("ml_collections")
from experiments.vision import attacks, claims, compare, figures, methods
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
        learning_rate=1e-2,
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


def test_the_papers_claims_by_hand():
    def row(method, forget, retain=0.9, m1=0.5, gap=0.1, seconds=1.0, offline=0.0):
        own = dict(forget=forget, retain=retain, test=0.8, m1=m1, gap=gap)
        own |= dict(seconds=seconds, offline=offline)
        return {k: [v, 0.0] for k, v in own.items()} | dict(
            method=method, setting="class"
        )

    rows = [row("original", 0.9, m1=0.7), row("retrain", 0.0, seconds=4.0, gap=0.0)]
    rows += [row("condensation", 0.3, gap=0.2, offline=5.0), row("BLUR", 0.0)]
    rows += [row("multi-GAN", 0.02, retain=0.8, gap=0.05)]
    rows += [row("multi-GAN without images", 0.02, gap=0.04)]
    lines = claims.table(rows, {"class": "A class"})
    told = [line.split(" | ")[2].split(":")[0] for line in lines[2:]]
    words = "holds **fails** holds **fails** holds **fails**"  # condensation
    words += " holds holds **fails** holds holds holds **fails**"  # multi-GAN
    assert told == words.split()
    assert "30.0 % of them right, 0.0 % when retrained" in lines[5]
    assert claims.table(rows[1:], {}) == lines[:2]


def test_what_diverges_is_told_and_the_others_go_on(tmp_path):
    def broken(case):
        raise FloatingPointError("it diverged")

    known = {"broken": broken, "ascent": methods.ascent, "retrain": broken}
    world, file = tiny_world(epochs=1), tmp_path / "lines.jsonl"
    lines = compare.compare(world, file, known=known)
    assert [line["finite"] for line in lines] == [True, False, True, False] * 2
    assert lines[1]["why"] == "it diverged"
    assert compare.compare(world, file, known=known) == lines
    rows = figures.summarise(lines)
    assert [row["broken"] for row in rows] == [0, 1, 0, 1] * 2
    figures.write(lines, world.config, tmp_path / "blobs")


def test_drawn_statistics_are_of_all_classes_though_rows_are_sorted(monkeypatch):
    world, seen = tiny_world(), []
    rows = world.train
    order = np.argsort(images.labels_of(rows), kind="stable")
    rows = {k: v[order] for k, v in rows.items()}
    monkeypatch.setattr(
        vision, "with_batch_stats", lambda m, p, batches: seen.extend(batches)
    )
    worlds.measured(world, {}, rows, most=3)
    labels = np.concatenate([images.labels_of(batch) for batch in seen])
    assert len(labels) == 60 and len(np.unique(labels)) == 10
    worlds.measured(world, {}, rows)
    assert sum(map(len, (images.labels_of(x) for x in seen[3:]))) == 120


def test_every_method_measures_statistics_on_what_is_kept(monkeypatch):
    world, kept = tiny_world(), []
    real = worlds.measured

    def spy(world, params, rows, *args, **kwargs):
        kept.append(rows)
        return real(world, params, rows, *args, **kwargs)

    monkeypatch.setattr(worlds, "measured", spy)
    params = world.model.init(jax.random.key(0))
    split = worlds.split(world, "class", 0)
    for name in ("SSD", "finetune", "condensation"):
        kept.clear()
        methods.METHODS[name](methods.Case(world, split, params, 0, {}))
        for rows in kept:
            assert kept and world.config.forget_class not in images.labels_of(rows)


@pytest.mark.parametrize(
    "name", [n for n in methods.METHODS if n not in ("retrain", "SSD", "condensation")]
)
def test_every_other_method_moves_the_model(name):
    world = tiny_world(tune=1)
    params = world.model.init(jax.random.key(0))
    case = methods.Case(world, worlds.split(world, "random", 0), params, 0, {})
    new, seconds, offline, _ = methods.METHODS[name](case)
    assert seconds > 0 and (offline > 0) == (name in ("multi-GAN", "SalUn"))
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
    assert (attacks.overfitting(world, params, half.forget) > 0).all()
