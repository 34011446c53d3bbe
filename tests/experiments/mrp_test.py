# SPDX-License-Identifier: Apache-2.0
"""MRP against others in a tiny world: topics, attackers, what the page says."""

import jax
import numpy as np
import pytest

from experiments.mrp import figures
from experiments.mrp import run as mrp
from experiments.shared import ledger
from jaxunlearn import evaluate

pytestmark = pytest.mark.usefixtures("standard_promotion")
NPO = "openunlearning.npo"
CONFIG = mrp.MrpConfig(
    methods={mrp.MRP: (1.0,), NPO: (3e-3, 1e-2)},
    seeds=(0,),
    steps=2,
    batch_size=4,
    sites={"mlp_out": (0, 1)},
    num_directions=2,
    num_protected=4,
    num_scored=5,
    eval_steps=(0, 3),
)


@pytest.fixture(scope="module")
def small(small_world):
    """The tiny world, its rows to forget labelled as of three authors."""
    rows = [
        row | {"author": f"author {i // 6}"}
        for i, row in enumerate(small_world[1].questions["forget"])
    ]
    questions = {**small_world[1].questions, "forget": rows}
    return small_world[1]._replace(questions=questions)


@pytest.fixture(scope="module")
def context(small):
    with jax.numpy_dtype_promotion("standard"):
        return mrp.prepare(small, CONFIG)


@pytest.fixture(scope="module")
def book(small, tmp_path_factory):
    """The ledger; without attackers of the reference models, which add no new step."""
    file = tmp_path_factory.mktemp("mrp") / "mrp.jsonl"
    with jax.numpy_dtype_promotion("standard"):
        book = ledger.Ledger(file, ledger.head(CONFIG))
        for name in ("original", "retrained"):
            book.add({"key": f"end {name} 0", "method": name, "seed": 0})
        mrp.run(small, book, CONFIG)
    return book


def test_topics_share_no_author_and_leave_none_out(small):
    rows = small.questions["forget"]
    found = mrp.split_topics(rows)
    authors = [{row["author"] for row in each} for each in found.values()]
    assert list(map(len, found.values())) == [6, 6, 4]
    assert len(set.union(*authors)) == sum(map(len, authors)) == 3
    with pytest.raises(ValueError, match=r"3 authors.* 1"):
        mrp.split_topics(rows[:6])


def test_answers_are_scored_by_their_sets(small, context):
    found = mrp.score(context, small.model, small.params)
    assert set(found) == {"A", "B", "C", "retain", "trained", "held out"}
    logps, lengths = evaluate.answer_logps(
        small.model, small.params, context.streams["B"]["forget"]
    )
    expected = np.exp(logps / lengths)[: CONFIG.num_scored].mean()
    np.testing.assert_allclose(found["B"]["probability"], expected, rtol=1e-4)


def test_every_method_forgets_three_topics_and_is_attacked(book, small, context):
    for name in (mrp.MRP, NPO):
        for line in (*(f"stage {name} 0 {x}" for x in "ABC"), f"end {name} 0"):
            assert line in book.keys
        for attacker in ("full", "lora"):
            assert f"attack {name} {attacker} 0.001 0" in book.keys
    assert f"attack {mrp.MRP} frozen projections 0.001 0" in book.keys
    exact = book["exact 0"]
    assert exact["folded"] < 1e-4 and exact["idempotent"] < 1e-6
    assert exact["directions"] == 3 * 2 * 2
    # Without the projections the model is the original.
    bare = book[f"attack {mrp.MRP} no projections 0"]["curve"]["0"]
    assert bare == mrp.score(context, small.model, small.params)
    # The attack begins where unlearning ended, and folding changes no score.
    for name in (mrp.MRP, NPO):
        end = book[f"stage {name} 0 C"]["scores"]
        curve = book[f"attack {name} full 0.001 0"]["curve"]
        for rows, each in curve["0"].items():
            expected = pytest.approx(end[rows]["probability"], abs=1e-4)
            assert each["probability"] == expected
        before, after = (curve[step]["trained"]["probability"] for step in ("0", "3"))
        assert after > before


def test_a_rate_that_diverged_is_not_used():
    def line(rate, probability, finite=True):
        scores = {"A": {"probability": probability}}
        key = f"sweep {NPO} {rate:.3g}"
        return {"key": key, "rate": rate, "finite": finite, "scores": scores}

    assert mrp.rate_of([line(3e-3, 0.05)], NPO, CONFIG) == (3e-3, True)
    broken = [line(3e-3, 0.5), line(1e-2, 0.0, finite=False)]
    assert mrp.rate_of(broken, NPO, CONFIG) == (3e-3, False)
    assert mrp.rate_of([], "original", CONFIG)[1] is False


def test_the_page_says_what_the_lines_say(book):
    about = dict(parameters=1, world="w", versions={"jax": "1"}, **CONFIG._asdict())
    about["max_probability"] = 1.0  # then no method forgets too little to be compared
    lines = [x for x in book.lines if set(x) - {"key", "method", "seed"}]
    text = "\n".join(figures.readme({"small": {"about": about, "lines": lines}}))
    stage = book[f"stage {mrp.MRP} 0 C"]["scores"]
    cells = [
        f"{stage[x]['exact']:.2f} ({stage[x]['probability']:.2f})" for x in figures.SETS
    ]
    assert f"| {mrp.MRP} | 1 | C | {' | '.join(cells)} |" in text
    assert "no projections" in text and "bar 1e-4" in text
    assert "is **undecided**" in text  # one seed decides nothing
    swept = [x for x in lines if x["key"].startswith("sweep")]
    text = "\n".join(figures.readme({"small": {"about": about, "lines": swept}}))
    assert "No attack had run" in text and f"| {NPO} | 0.003 |" in text


def test_verdicts_need_all_seeds_to_agree():
    def line(method, seed, value):
        curve = {"0": {"held out": dict(probability=value, exact=0.0)}}
        curve["0"]["trained"] = curve["0"]["held out"]
        about = dict(method=method, seed=seed, attacker="full", rate=1.0, curve=curve)
        return {"key": f"attack {method} {seed}", **about}

    about = {"methods": {mrp.MRP: [1], NPO: [1]}, "max_probability": 0.1}
    for values, word in (((0.1, 0.1), "holds"), ((0.1, 0.9), "undecided")):
        lines = [line(mrp.MRP, seed, x) for seed, x in enumerate(values)]
        lines += [line(NPO, seed, 0.5) for seed in (0, 1)]
        first = figures._verdict(lines, about, figures.summarise(lines))[0]
        assert word in first
