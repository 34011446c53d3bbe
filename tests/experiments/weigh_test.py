# SPDX-License-Identifier: Apache-2.0
"""Learning gamma and the weights of retain rows, made tiny; and the penalty's error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.bilevel import error as bilevel_error
from experiments.bilevel import figures as weigh_figures
from experiments.bilevel import weigh
from jaxunlearn import bilevel

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAN = weigh.Plan(
    forget=4,
    retain=6,
    held_out=4,
    test=6,
    updates=3,
    warm_up=2,
    unlearn=4,
    learning_rate=3e-3,
    grid=(0.1, 1.0),
    seeds=(0,),
)


def test_no_row_is_seen_by_two_levels_and_every_third_to_keep_is_wrong(small_world):
    rows = weigh.rows_of(small_world[1], PLAN, seed=3)
    assert rows.wrong.tolist() == [True, False, False] * 2
    hands = [rows.forget, rows.retain, *rows.held_out.values(), *rows.test.values()]
    asked = [
        tuple(np.where(hand["answer"][i], 0, hand["tokens"][i]).tolist())
        for hand in hands
        for i in range(len(hand["tokens"]))
    ]
    assert len(set(asked)) == len(asked) == 4 + 6 + 2 * 4 + 2 * 6
    # Wrong answers are those that the model does not believe.
    small = small_world[1]
    believed = np.asarray(weigh.probability(small.model, small.params, rows.retain))
    assert believed[rows.wrong].max() < believed[~rows.wrong].min()


def test_the_lower_level_is_what_its_equation_says(small_world):
    small = small_world[1]
    rows = weigh.rows_of(small, PLAN, seed=0)
    upper, lower = weigh.levels(small, rows, pull=0.5)
    x = {"gamma": jnp.float32(0.3), "rows": jnp.arange(6, dtype=jnp.float32)}
    y = jax.tree.map(lambda a: a + jnp.asarray(0.01, a.dtype), small.params)
    count = sum(a.size for a in jax.tree.leaves(y))
    # At y_0 every answer is as likely as under the reference: NPO is 2 log 2 / beta.
    nll = -np.log(weigh.probability(small.model, small.params, rows.retain))
    expected = np.exp(0.3) * 20 * np.log(2) + jax.nn.softmax(x["rows"]) @ nll
    assert_allclose(lower(x, small.params), expected, rtol=1e-4)
    far = lower(x, y) - weigh.levels(small, rows, pull=1e-9)[1](x, y)
    assert_allclose(far, 0.25 * count * 1e-4, rtol=1e-2)
    p = {k: weigh.probability(small.model, y, v) for k, v in rows.held_out.items()}
    assert_allclose(upper(x, y), p["forget"].mean() + 1 - p["retain"].mean(), rtol=1e-5)


def test_runs_write_their_figures_and_go_on_where_they_stopped(
    small_world, tmp_path, monkeypatch
):
    small, file = small_world[1], tmp_path / "weigh.jsonl"
    lines = weigh.compare_with_grid(small, file, PLAN)
    runs = [line["key"] for line in lines]
    grid = [f"{run} {g:g} 0" for run in ("grid", "clean") for g in PLAN.grid]
    assert runs == ["learnt 0", *grid]
    learnt = lines[0]
    assert len(learnt["updates"]) == 3 and learnt["gamma"] != PLAN.start
    assert_allclose(sum(learnt["weights"]), 1, rtol=1e-5)
    monkeypatch.setattr(weigh, "learn", lambda *_, **__: pytest.fail("learnt again"))
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join(text[:-1]))
    again = weigh.compare_with_grid(small, file, PLAN)
    assert [x["key"] for x in again] == runs
    assert_allclose(again[-1]["upper"], lines[-1]["upper"], rtol=1e-6)
    place = tmp_path / "weigh_small"
    weigh_figures.write(lines, weigh.head(small, PLAN), place)
    assert place.with_suffix(".png").stat().st_size > 5000
    rows = json.loads(place.with_suffix(".json").read_text())["summary"]
    best = {r["run"]: r["upper"][0] for r in rows if r["gamma"] == "its best"}
    assert best["grid"] == min(x["upper"] for x in lines if x["run"] == "grid")
    assert "learnt by f2sa" in place.with_suffix(".md").read_text()


def test_a_world_too_small_says_how_many_rows_it_needs(small_world):
    with pytest.raises(ValueError, match="needs 110 forget rows"):
        weigh.rows_of(small_world[1], PLAN._replace(test=102), seed=0)


def test_the_share_of_right_rows_that_outweigh_wrong_ones():
    line = {"weights": [0.1, 0.2, 0.3, 0.1], "wrong": [True, False, False, False]}
    assert weigh_figures.found_wrong(line) == pytest.approx((1 + 1 + 0.5) / 3)


def test_the_error_of_the_penalty_falls_as_one_over_its_strength():
    with jax.enable_x64(True):
        errors = np.array(bilevel_error.errors_in("float64"))
    assert_allclose(errors[2:6] / errors[3:7], 10, rtol=0.1)


def test_the_experiment_leans_on_the_librarys_own_forms(small_world, monkeypatch):
    """What is learnt comes from bilevel.f2sa and from nothing beside it."""
    small = small_world[1]
    found = bilevel.f2sa

    def still(*arguments, **options):
        answer = found(*arguments, **options)
        return answer._replace(dx=jax.tree.map(jnp.zeros_like, answer.dx))

    monkeypatch.setattr(weigh.bilevel, "f2sa", still)
    rows = weigh.rows_of(small, PLAN, seed=0)
    x, entries = weigh.learn(small, rows, PLAN)
    assert_allclose(x["gamma"], np.log(PLAN.start), rtol=1e-6)
    assert not np.any(x["rows"])
    assert len(entries) == 3
