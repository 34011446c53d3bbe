# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods: which runs there are, and what the page makes of them."""

import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxunlearn as ju
from experiments.benchmarks import methods as cost
from experiments.comparison import figures
from experiments.comparison import run as compare
from experiments.shared import ledger
from experiments.small import methods, score, unlearn
from jaxunlearn.data import table
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
SETTINGS = compare.Settings(
    (1e-3, 3e-3), (0, 1), steps=2, batch_size=4, scored=dict(forget=8, retain=8)
)
PAIR = ("blur.npo", "sum.npo")


@pytest.fixture(scope="module")
def chosen():
    return {name: methods.methods()[name] for name in PAIR}


@pytest.fixture(scope="module")
def done(small_world, chosen, tmp_path_factory):
    """The ledger of a finished comparison."""
    with jax.numpy_dtype_promotion("standard"):
        file = tmp_path_factory.mktemp("lines") / "methods.jsonl"
        book = ledger.Ledger(file, {"key": "head"})
        compare.compare(small_world[1], book, chosen=chosen, settings=SETTINGS)
        return book


@pytest.mark.parametrize("name", sorted(methods.SUMS))
def test_a_sum_has_the_adamw_of_its_blur(monkeypatch, name):
    calls = []
    monkeypatch.setattr(
        optax, "adamw", lambda learning_rate, **how: calls.append((learning_rate, how))
    )
    monkeypatch.setattr(optax, "chain", lambda *links: links)
    model, _ = tiny.tiny_model()
    for each in (name, methods.SUMS[name]):
        methods.methods()[each].build(model, 1e-3)
    second, first = {**calls[-1][1]}, {**calls[-2][1]}
    assert {"eps": 1e-8} | first == second and calls[-1][0] == calls[-2][0] == 1e-3


def test_every_setting_runs_once_on_every_seed(done, small_world, chosen, monkeypatch):
    runs = {(x["method"], x["rate"], x["seed"]) for x in done.lines if "rate" in x}
    rates = (1e-5, *SETTINGS.rates)
    assert runs == {(m, r, s) for m in PAIR for r in rates for s in SETTINGS.seeds}
    assert len(done.lines) == 2 + len(runs)
    assert all(x["steps"] == 2 and x["finite"] for x in done.lines if "rate" in x)
    # The same again runs nothing.
    monkeypatch.setattr(unlearn, "run", lambda *_, **__: pytest.fail("ran again"))
    book = ledger.Ledger(done.file, done.head)
    found = compare.compare(small_world[1], book, chosen=chosen, settings=SETTINGS)
    assert found == done.lines


@pytest.fixture(scope="module")
def runner(small_world, chosen):
    """A weighted sum of four steps, compiled once for this module."""
    with jax.numpy_dtype_promotion("standard"):
        streams = unlearn.tables(small_world[1])
        sizes = dict(steps=4, batch_size=4)
        return unlearn.runner(small_world[1], chosen["sum.npo"], streams, **sizes)


def test_one_compiled_step_serves_every_rate(small_world, chosen, runner):
    small = small_world[1]
    found, about = unlearn.run(runner, rate=3e-3, seed=1)
    schedule = unlearn.rate_schedule(4)
    recipe = chosen["sum.npo"].build(small.model, lambda count: 3e-3 * schedule(count))
    step, state, frozen = recipe.setup(small.model, small.params)
    loader = table.streams(runner.tables, 4, seed=1)
    state, _ = ju.fit(step, state, loader, frozen, steps=4)
    assert about["finite"] and about["steps"] == 4
    for a, b in zip(*map(jax.tree.leaves, (found, state.params)), strict=True):
        assert_allclose(a, b, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, small.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_run_that_diverges_ends_with_its_last_good_params(small_world, runner):
    params, about = unlearn.run(runner, rate=1e30, seed=0)
    assert not about["finite"] and about["steps"] < 4
    scorer = score.scorer(small_world[1], rows=SETTINGS.scored)
    assert np.isfinite(score.summary(scorer, params)["utility"])


def test_the_rate_rises_to_one_and_falls_to_zero():
    schedule = unlearn.rate_schedule(20)
    values = [float(schedule(i)) for i in range(21)]
    assert_allclose(values[:3], [0.5, 1.0, 17 / 18], rtol=1e-6)
    assert values[-1] == 0.0 and min(values) >= 0.0


def test_the_best_rate_balances_forgetting_and_utility():
    run = dict(method="m", seed=0, utility=0.8, forget_nll=0.01, finite=True)
    lines = [
        {"method": "retrained", "forget_nll": 8.0},
        run | {"rate": 1e-4},
        run | {"rate": 1e-3, "utility": 0.6, "forget_nll": 6.0},
        run | {"rate": 1e-2, "utility": 0.6, "forget_nll": 80.0},
    ]
    settings = SETTINGS._replace(rates=(1e-4, 1e-3, 1e-2))
    assert compare.best_rate(lines, "m", settings) == 1e-3
    assert compare.best_rate(lines[:-1], "m", settings) is None
    assert_allclose(figures.balance(lines[2], 8.0), 2 * 0.6 * 0.75 / 1.35)


def test_at_equal_forgetting_the_curves_are_read_between_the_rates():
    base = dict(forget_nll=0.0, utility=1.0, finite=True)
    lines = [
        base | {"method": "original"},
        base | {"method": "retrained", "forget_nll": 8.0},
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
    (words,) = figures.pair_sentences([middle])
    assert "`blur.npo` has 0.040" in words and "undecided" not in words


def test_the_page_has_every_method_and_both_reference_models(done, tmp_path):
    about = ledger.head(SETTINGS, world="w") | {"parameters": 1e6, "seeds": [0, 1]}
    content = figures.content(done.lines, about)
    assert len(content["methods"]) == 4
    assert all(row["seeds"] == 2 for row in content["methods"])
    text = "\n".join(figures.readme({"small": content}))
    for name in ("**retrained**", "**original**", *PAIR):
        assert f"| {name} |" in text
    figures.draw(content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_benchmark_holds_each_method_against_a_plain_step(small_world, chosen):
    small = small_world[1]
    ascent = methods.methods()["openunlearning.ascent"]
    lines = cost.measure(
        small.model, chosen | {"ascent": ascent}, rounds=2, rows=2, length=16
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
    small_world, chosen
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
    lost = chosen["sum.npo"]._replace(sources={"retain": "nowhere"})
    with pytest.raises(KeyError, match="nowhere"):
        unlearn.runner(small, lost, tables, steps=2, batch_size=2)
