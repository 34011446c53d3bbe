# SPDX-License-Identifier: Apache-2.0
"""Learning gamma and the weights of retain rows, tiny; and the penalty's error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.bilevel import error as bilevel_error
from experiments.bilevel import figures, weigh
from experiments.shared import ledger
from jaxunlearn import bilevel

pytestmark = pytest.mark.usefixtures("standard_promotion")
SETTINGS = weigh.Settings(
    forget=4,
    retain=6,
    held_out=4,
    test=6,
    updates=2,
    warm_up=1,
    steps=1,
    unlearn=2,
    learning_rate=3e-3,
    grid=(0.1, 1.0),
    seeds=(0,),
)


def test_levels_share_no_row_and_every_third_retain_row_is_wrong(small_world):
    rows = weigh.split_rows(small_world[1], SETTINGS, seed=3)
    assert rows.wrong.tolist() == [True, False, False] * 2
    parts = [rows.forget, rows.retain, *rows.held_out.values(), *rows.test.values()]
    prompts = [
        tuple(np.where(part["answer"][i], 0, part["tokens"][i]).tolist())
        for part in parts
        for i in range(len(part["tokens"]))
    ]
    assert len(set(prompts)) == len(prompts) == 4 + 6 + 2 * 4 + 2 * 6
    # Wrong answers have a low probability under the original model.
    small = small_world[1]
    probability_of = np.asarray(
        weigh.probability(small.model, small.params, rows.retain)
    )
    assert probability_of[rows.wrong].max() < probability_of[~rows.wrong].min()


def test_the_lower_level_is_what_its_equation_says(small_world):
    small = small_world[1]
    rows = weigh.split_rows(small, SETTINGS, seed=0)
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


def test_every_run_is_measured_once_and_drawn(small_world, tmp_path, monkeypatch):
    small, head = small_world[1], ledger.head(SETTINGS, world=small_world[1].digest)
    book = ledger.Ledger(tmp_path / "weigh.jsonl", head)
    lines = weigh.compare_with_grid(small, book, SETTINGS)
    runs = [line["key"] for line in lines]
    grid = [f"{run} {g:g} 0" for run in ("grid", "clean") for g in SETTINGS.grid]
    assert runs == ["learnt 0", *grid]
    learned = lines[0]
    assert len(learned["updates"]) == 2 and learned["gamma"] != SETTINGS.start
    assert_allclose(sum(learned["weights"]), 1, rtol=1e-5)
    monkeypatch.setattr(weigh, "learn", lambda *_: pytest.fail("learned again"))
    again = weigh.compare_with_grid(small, ledger.Ledger(book.file, head), SETTINGS)
    assert again == lines
    content = {"about": head | {"seeds": [0]}, "runs": lines}
    assert "learned by f2sa" in "\n".join(figures.readme({"weigh": content}))
    figures.draw_weigh(content, tmp_path / "weigh.png")
    assert (tmp_path / "weigh.png").stat().st_size > 5000
    rows = figures.summarise(lines)
    best = {r["run"]: r["upper"][0] for r in rows if r["gamma"] == "best"}
    assert best["grid"] == min(x["upper"] for x in lines if x["run"] == "grid")


def test_a_world_that_is_too_small_is_refused(small_world):
    with pytest.raises(ValueError, match="110 forget rows"):
        weigh.split_rows(small_world[1], SETTINGS._replace(test=102), seed=0)


def test_separation_is_the_chance_that_a_right_row_outweighs_a_wrong_one():
    line = {"weights": [0.1, 0.2, 0.3, 0.1], "wrong": [True, False, False, False]}
    assert figures.separation(line) == pytest.approx((1 + 1 + 0.5) / 3)


def test_the_error_of_the_penalty_falls_as_one_over_its_strength():
    with jax.enable_x64(True):
        errors = np.array(bilevel_error.errors_in("float64"))
    assert_allclose(errors[2:6] / errors[3:7], 10, rtol=0.1)


def test_what_is_learned_comes_from_f2sa_alone(small_world, monkeypatch):
    """Where f2sa gives zeros, nothing is learned."""
    small = small_world[1]
    found = bilevel.f2sa

    def still(*arguments, **options):
        answer = found(*arguments, **options)
        return answer._replace(dx=jax.tree.map(jnp.zeros_like, answer.dx))

    monkeypatch.setattr(weigh.bilevel, "f2sa", still)
    rows = weigh.split_rows(small, SETTINGS, seed=0)
    x, entries = weigh.learn(small, rows, SETTINGS)
    assert_allclose(x["gamma"], np.log(SETTINGS.start), rtol=1e-6)
    assert not np.any(x["rows"])
    assert len(entries) == 2
