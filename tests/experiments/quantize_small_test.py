# SPDX-License-Identifier: Apache-2.0
"""Rounding what was unlearned in a tiny world: what runs, and what is made of it."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.quantization import figures as quantize_figures
from experiments.quantization import run as quantize
from experiments.small import unlearn
from jaxunlearn import edits
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAN = quantize.Plan(
    rates=(1e-5, 3e-3, 1e-2),
    seeds=(0, 1),
    steps=12,
    rows=4,
    asked=dict(forget=8, retain=8),
    group=32,
)
KNOWN = {name: quantize.RECIPES[name] for name in ("GA", "NPO + KL", "SURE NPO + KL")}


@pytest.fixture(scope="module")
def done(small_world, tmp_path_factory):
    """(the file of results, its lines)."""
    file = tmp_path_factory.mktemp("lines") / "quantize.jsonl"
    with jax.numpy_dtype_promotion("standard"):
        run = partial(quantize.compare_precisions, known=KNOWN, plan=PLAN)
        return file, run(small_world[1], file)


def test_every_method_runs_on_every_seed_at_the_lowest_rate_that_forgets(done):
    lines = done[1]
    for name in KNOWN:
        for dtype in PLAN.dtypes:
            own = [x for x in lines if (x["method"], x["dtype"]) == (name, dtype)]
            swept = {x["rate"]: x for x in own if not x["rounded"]}
            rounded = [x for x in own if x["rounded"]]
            assert [x["seed"] for x in rounded] == list(PLAN.seeds)
            rate, forgets = quantize.rate_of(lines, name, dtype, PLAN)
            assert {x["rate"] for x in rounded} == {rate}
            chance = {
                r: x["scores"]["full"]["forget_probability"] for r, x in swept.items()
            }
            assert 1e-5 in swept and chance[1e-5] > quantize.FORGOTTEN
            if forgets:
                assert chance[rate] <= quantize.FORGOTTEN
                assert rate == max(swept)  # no higher one was tried
            else:
                assert chance[rate] == min(chance.values())
                assert set(swept) == set(PLAN.rates)
            # The first seed runs as it did in the sweep.
            again = rounded[0]["scores"]["full"]["forget_probability"]
            assert_allclose(again, chance[rate], rtol=1e-5)


def test_bfloat16_training_has_no_other_masters(small_world, monkeypatch):
    small, seen = small_world[1], []
    run = unlearn.run
    monkeypatch.setattr(
        unlearn, "run", lambda made, **how: seen.append(run(made, **how)) or seen[-1]
    )
    small = small._replace(params=quantize.cast(small.params, "bfloat16"))
    method = quantize.Method("x", 0.0, quantize._built(KNOWN["NPO + KL"]))
    made = unlearn.runner(small, method, unlearn.tables(small), steps=3, batch_size=4)
    unlearn.run(made, rate=1e-2, seed=0)
    state = made.init(0)
    floats = [
        x.dtype
        for x in jax.tree.leaves((seen[0][0], state.params, state.opt_state))
        if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    ]
    assert set(floats) == {jnp.dtype(jnp.bfloat16)}
    # A step smaller than half the distance to the next number is lost.
    lost, _ = unlearn.run(made, rate=1e-7, seed=0)
    kernel = lost["blocks"]["mlp"]["up"]["kernel"]
    same = np.mean(kernel == small.params["blocks"]["mlp"]["up"]["kernel"])
    assert same > 0.99


def test_what_was_stopped_goes_on(done, small_world, tmp_path, monkeypatch):
    file, lines = done
    text = file.read_text().splitlines(keepends=True)
    part = tmp_path / "quantize.jsonl"
    part.write_text("".join(text[:-2]) + text[-2][:40])  # cut off while writing
    run, ran = unlearn.run, []
    monkeypatch.setattr(
        unlearn, "run", lambda made, **how: (ran.append(how), run(made, **how))[1]
    )
    again = partial(quantize.compare_precisions, small_world[1], part, known=KNOWN)
    assert [x["key"] for x in again(plan=PLAN)] == [x["key"] for x in lines]
    assert len(ran) == 2
    with pytest.raises(ValueError, match="Move it away"):
        again(plan=PLAN._replace(steps=7))


def test_quantizers_are_those_of_the_library(small_world):
    small = small_world[1]
    found = quantize.quantizers(small, 32)
    assert list(found) == list(quantize_figures.PRECISIONS)
    kernel = ("blocks", "mlp", "down", "kernel")
    values = {name: function(small.params) for name, function in found.items()}
    for part in kernel:
        values = {name: tree[part] for name, tree in values.items()}
    assert values["full"] is small.params["blocks"]["mlp"]["down"]["kernel"]
    gaps = {
        name: float(jnp.linalg.norm(x - values["full"])) for name, x in values.items()
    }
    assert 0 < gaps["int8"] < gaps["int4"] < gaps["int4_tensor"] < gaps["int3"] * 2
    assert len(np.unique(values["int4_tensor"][0])) <= 16
    assert not np.array_equal(values["gptq4"], values["int4"])


def test_how_far_weights_moved_by_hand():
    w = jnp.arange(-7.0, 8.0)[:, None]  # steps of 1
    params = {"blocks": {"up": {"kernel": jnp.pad(w, ((0, 1), (0, 0)))[None]}}}
    shift = jnp.zeros((1, 16, 1)).at[0, :4, 0].set(jnp.array([0.4, 0.6, 1.0, -0.4]))
    after = jax.tree.map(lambda x: x + shift, params)
    found = quantize.moved(params, after, 16)
    assert_allclose([found["steps"], found["codes"]], [2.4 / 16, 2 / 16], rtol=1e-6)
    _, params = tiny.tiny_model()
    assert quantize.moved(params, params, 8) == {"steps": 0.0, "codes": 0.0}
    four = edits.quantize(params, "int4", group=8)
    assert quantize.moved(params, four, 8)["codes"] < 0.01


def line(method, dtype="float32", **rows):
    scores = {
        name: dict(forget_probability=np.mean(x), forget_exact=0.0, utility=0.5)
        for name, x in rows.items()
    }
    about = dict(rate=1e-3, finite=True, steps=0.1, codes=0.05, rounded=True)
    return about | dict(method=method, dtype=dtype, scores=scores, rows=rows)


def test_a_return_is_large_and_certain():
    known = [0.9] * 20
    full, small, lone = [0.0] * 20, [0.04] * 20, [0.0] * 19 + [1.0]
    large = np.linspace(0.1, 0.5, 20).tolist()
    lines = [line("untouched", **dict.fromkeys(("full", "int4"), known))]
    lines[0].pop("rounded")
    about = {"forgotten": 0.1}
    for values, back in ((large, True), (small, False), (lone, False), (full, False)):
        row = quantize_figures.summarise(
            [*lines, line("GA", full=full, int4=values)], about
        )[0]
        assert row["int4"]["back"] is back and row["forgets"]
        assert_allclose(row["int4"]["return"][0], np.mean(values), atol=1e-9)
        assert_allclose(row["int4"]["retained"], np.mean(values) / 0.9, atol=1e-9)


def test_tables_and_plot(done, small_world, tmp_path):
    small, lines = small_world[1], done[1]
    about = {"parameters": small.about["parameters"], "forgotten": 0.1}
    about = quantize.head(small, PLAN) | about
    place = tmp_path / "quantize_small"
    quantize_figures.write(lines, about, place)
    assert place.with_suffix(".png").stat().st_size > 5000
    text = place.with_suffix(".md").read_text()
    assert "At 4 bits the forgotten comes back in" in text
    assert "- SURE NPO + KL, bfloat16" in text
    whole = json.loads(place.with_suffix(".json").read_text())
    assert len(whole["summary"]) == len(KNOWN) * len(PLAN.dtypes)
    assert all(row["seeds"] == 2 for row in whole["summary"])
