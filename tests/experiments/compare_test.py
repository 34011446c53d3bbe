# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods: what runs, what is taken up again, what is made of it."""

import json

import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxunlearn as ju
from experiments.benchmarks import methods as cost
from experiments.comparison import figures
from experiments.comparison import run as compare
from experiments.small import methods, score, unlearn
from jaxunlearn.data import table
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAN = compare.Plan(
    (1e-3, 3e-3), (0, 1), steps=6, rows=4, asked=dict(forget=8, retain=8)
)
PAIR = ("blur.npo", "sum.npo")


@pytest.fixture(scope="module")
def known():
    return {name: methods.methods()[name] for name in PAIR}


@pytest.fixture(scope="module")
def done(small_world, known, tmp_path_factory):
    """(the file of results, its lines)."""
    with jax.numpy_dtype_promotion("standard"):
        file = tmp_path_factory.mktemp("lines") / "methods.jsonl"
        return file, compare.compare(small_world[1], file, known=known, plan=PLAN)


@pytest.mark.parametrize("name", sorted(methods.SUMS))
def test_a_sum_has_the_adamw_of_its_blur(monkeypatch, name):
    asked = []
    monkeypatch.setattr(
        optax, "adamw", lambda learning_rate, **how: asked.append((learning_rate, how))
    )
    monkeypatch.setattr(optax, "chain", lambda *links: links)
    model, _ = tiny.tiny_model()
    for each in (name, methods.SUMS[name]):
        methods.methods()[each].build(model, 1e-3)
    theirs, own = {**asked[-1][1]}, {**asked[-2][1]}
    assert {"eps": 1e-8} | own == theirs and asked[-1][0] == asked[-2][0] == 1e-3


def test_every_setting_runs_once_on_every_seed(done):
    file, lines = done
    runs = {(x["method"], x["rate"], x["seed"]) for x in lines if "rate" in x}
    rates = (1e-5, *PLAN.rates)
    assert runs == {(m, r, s) for m in PAIR for r in rates for s in PLAN.seeds}
    assert len(lines) == 2 + len(runs)
    assert all(x["steps"] == 6 and x["finite"] for x in lines if "rate" in x)
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == lines


def test_a_comparison_that_was_stopped_runs_only_what_is_missing(
    done, small_world, known, tmp_path, monkeypatch
):
    file, lines = done
    text = file.read_text().splitlines(keepends=True)
    part = tmp_path / "methods.jsonl"
    part.write_text("".join(text[:-2]) + text[-2][:40])  # cut off while writing
    run, ran = unlearn.run, []
    monkeypatch.setattr(
        unlearn, "run", lambda made, **how: (ran.append(how), run(made, **how))[1]
    )
    again = compare.compare(small_world[1], part, known=known, plan=PLAN)
    assert len(ran) == 2
    drop = ("seconds",)
    plain = [{k: v for k, v in x.items() if k not in drop} for x in (*again, *lines)]
    assert plain[: len(lines)] == plain[len(lines) :]
    other = PLAN._replace(steps=7)
    with pytest.raises(ValueError, match="Move it away"):
        compare.compare(small_world[1], part, known=known, plan=other)


def test_one_compiled_step_serves_every_rate(small_world, known):
    small = small_world[1]
    streams = unlearn.tables(small)
    made = unlearn.runner(small, known["sum.npo"], streams, steps=4, batch_size=4)
    found, about = unlearn.run(made, rate=3e-3, seed=1)
    shape = unlearn.rate_schedule(4)
    recipe = known["sum.npo"].build(small.model, lambda count: 3e-3 * shape(count))
    state = ju.init_state(small.params, recipe.tx, jax.random.key(1))
    step = jax.jit(ju.make_step(recipe.terms, recipe.tx))
    loader = table.streams(streams, 4, seed=1)
    state, _ = ju.fit(step, state, loader, steps=4)
    assert about["finite"] and about["steps"] == 4
    for a, b in zip(*map(jax.tree.leaves, (found, state.params)), strict=True):
        assert_allclose(a, b, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, small.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_run_that_diverges_is_scored_where_it_stood(small_world, known):
    small = small_world[1]
    streams = unlearn.tables(small)
    made = unlearn.runner(small, known["sum.npo"], streams, steps=4, batch_size=4)
    params, about = unlearn.run(made, rate=1e30, seed=0)
    assert not about["finite"] and about["steps"] < 4
    assert np.isfinite(score.summary(score.scorer(small), params)["utility"])


def test_the_rate_rises_to_one_and_falls_to_nothing():
    shape = unlearn.rate_schedule(20)
    values = [float(shape(i)) for i in range(21)]
    assert_allclose(values[:3], [0.5, 1.0, 17 / 18], rtol=1e-6)
    assert values[-1] == 0.0 and min(values) >= 0.0


def test_the_best_rate_forgets_and_keeps():
    kept = dict(method="m", seed=0, utility=0.8, forget_nll=0.01, finite=True)
    lines = [
        {"method": "twin", "forget_nll": 8.0},
        kept | {"rate": 1e-4},
        kept | {"rate": 1e-3, "utility": 0.6, "forget_nll": 6.0},
        kept | {"rate": 1e-2, "utility": 0.6, "forget_nll": 80.0},
    ]
    plan = PLAN._replace(rates=(1e-4, 1e-3, 1e-2))
    assert compare.best(lines, "m", plan) == 1e-3
    assert compare.best(lines[:-1], "m", plan) is None
    assert_allclose(figures.balance(lines[2], 8.0), 2 * 0.6 * 0.75 / 1.35)


def test_at_equal_forgetting_the_curves_are_read_between_the_rates():
    base = dict(forget_nll=0.0, utility=1.0, finite=True)
    lines = [
        base | {"method": "untouched"},
        base | {"method": "twin", "forget_nll": 8.0},
    ]
    rates, seeds = (1e-3, 1e-2), (0, 1)
    for seed in seeds:
        for name, loss in (("blur.npo", 0.1), ("sum.npo", 0.2)):
            for rate, nll in zip(rates, (3.0, 10.0), strict=True):
                utility = 1.0 - loss * nll / 10 - 0.01 * seed * nll
                lines.append(
                    base
                    | {"method": name, "rate": rate, "seed": seed}
                    | {"forget_nll": nll, "utility": utility}
                )
    found = figures.equal_forgetting(lines, {"rates": rates, "seeds": seeds})
    assert [pair["level"] for pair in found] == list(figures.LEVELS)
    middle = found[1]
    assert_allclose(middle["gap"], [0.1 * 4 / 10, 0.0], atol=1e-12)
    assert_allclose(middle["seed_spread"], 0.04 / 2**0.5)
    assert middle["beyond_spread"]
    unequal = [x for x in lines if (x.get("rate"), x.get("seed")) != (1e-2, 1)]
    assert not figures.equal_forgetting(unequal, {"rates": rates, "seeds": seeds})
    (words,) = figures._said([middle])
    assert "`blur.npo` is ahead of `sum.npo` by 0.040" in words and ", more" in words


def test_the_figures_hold_every_method_and_the_twin(done, small_world, tmp_path):
    pytest.importorskip("matplotlib")
    about = compare.head(small_world[1], PLAN)
    about |= {"rates": list(PLAN.rates), "seeds": list(PLAN.seeds), "parameters": 1e6}
    figures.write(done[1], about, tmp_path / "m")
    text = (tmp_path / "m.md").read_text()
    assert "retrained twin" in text and all(f"| {name} |" in text for name in PAIR)
    whole = json.loads((tmp_path / "m.json").read_text())
    assert len(whole["methods"]) == 4 and all(x["seeds"] == 2 for x in whole["methods"])
    assert (tmp_path / "m.png").stat().st_size > 10_000


def test_the_benchmark_holds_each_method_against_a_plain_step(small_world, known):
    small = small_world[1]
    ascent = methods.methods()["openunlearning.ascent"]
    lines = cost.measure(
        small.model, known | {"ascent": ascent}, rounds=2, rows=2, length=16
    )
    by_name = {line["method"]: line for line in lines}
    plain = by_name[cost.PLAIN]
    assert plain["time_ratio"] == plain["memory_ratio"] == 1.0
    assert by_name["ascent"]["tokens"] * 2 == plain["tokens"] == 64
    assert [by_name[name]["gradient_trees"] for name in PAIR] == [2, 2]
    half = by_name["ascent"]
    assert_allclose(
        half["time_ratio"], 2 * half["milliseconds"] / plain["milliseconds"]
    )
    assert "blur.npo" in cost.markdown(lines, 2)


def test_pairs_stay_together_and_a_stream_without_a_table_is_refused(
    small_world, known
):
    small = small_world[1]
    tables = unlearn.tables(small)
    assert set(tables) == {"forget", "retain", "wrong", "refusal"}
    streams = {"forget": tables["forget"], "alternate": tables["wrong"]}
    drawn = unlearn.batches(streams, 4, seed=1)
    for batch in (next(drawn) for _ in range(6)):
        first, second = batch["forget"], batch["alternate"]
        questions = first["mask"] & ~first["answer"]
        assert np.array_equal(questions, second["mask"] & ~second["answer"])
        assert (first["tokens"] == second["tokens"])[questions].all()
        assert (first["tokens"] != second["tokens"]).any()
    lost = known["sum.npo"]._replace(sources={"retain": "nowhere"})
    with pytest.raises(KeyError, match="nowhere"):
        unlearn.runner(small, lost, tables, steps=2, batch_size=2)
