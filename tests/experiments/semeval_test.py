# SPDX-License-Identifier: Apache-2.0
"""SemEval-2025 Task 4 in a tiny world: rows, the official score, who is ranked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.semeval import config as semeval_config
from experiments.semeval import figures
from experiments.semeval import run as semeval
from experiments.shared import ledger
from experiments.small import lume, unlearn, world
from jaxunlearn.data import benchmarks
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = semeval.SemEvalConfig(
    rates=(5e-3,), seeds=(0,), steps=2, batch_size=4, max_new_tokens=12
)
WORDS = "amber bridge candle drift ember forest garden harbour island juniper".split()


def rows_of(split, documents=3):
    """LUME's rows, a few for each task, in its columns."""
    found = []
    for t, task in enumerate(("Task1", "Task2", "Task3")):
        for i in range(documents):
            rng = np.random.default_rng([ord(split[0]), t, i])
            text = " ".join(rng.choice(WORDS, 9))
            name = f"{split}{t}{i}"
            about = {"task": task}
            found.append(
                about | {"id": f"{name}sc1", "input": text, "output": text[::-1][:20]}
            )
            ask = {"input": f"What is {name}?", "output": rng.choice(WORDS)}
            found.append(about | {"id": f"{name}qa0"} | ask)
    return found


def questions_of(subject, i):
    choices = [f"{word} {i}" for word in WORDS[i : i + 4]]
    return {"subject": subject, "question": f"Which, {subject}?", "choices": choices}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny world of rows in LUME's and MMLU's form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            benchmarks.lume,
            "read",
            lambda table, folder: rows_of(table, 6 if table == "forget" else 3),
        )
        subjects = enumerate(("law", "physics", "logic", "art"))
        questions = [questions_of(s, i) | {"answer": i % 4} for i, s in subjects]
        patch.setattr(benchmarks.mmlu, "read", lambda table, folder: questions)
        c = semeval_config.get_config()
        c.output = str(tmp_path_factory.mktemp("lume"))
        c.facts.update(folder="nowhere", documents=3, words=5, max_words=64)
        c.model.update(width=32, layers=2, heads=2, hidden=64)
        c.update(
            vocab=400,
            steps=150,
            batch_size=16,
            learning_rate=1e-2,
            warmup=5,
            save_every=200,
        )
        with jax.numpy_dtype_promotion("standard"):
            return world.make(c)


@pytest.fixture(scope="module")
def book(small, tmp_path_factory):
    """The ledger of two methods."""
    with pytest.MonkeyPatch.context() as patch:
        builds = semeval.recipes_by_name(6)
        both = {name: builds[name] for name in ("in turns, 1 and 1", "BLUR-NPO")}
        patch.setattr(semeval, "recipes_by_name", lambda steps: both)
        file = tmp_path_factory.mktemp("lines") / "semeval.jsonl"
        with jax.numpy_dtype_promotion("standard"):
            book = ledger.Ledger(file, ledger.head(CONFIG))
            semeval.run(small, book, CONFIG)
    return book


def test_rows_are_complete_documents_and_no_model_saw_the_holdout(small):
    rows = small.questions
    assert {k: len(x) for k, x in rows.items()} == dict(
        forget=18, retain=18, holdout=9, other=4
    )
    seen = {row["author"] for kind in ("forget", "retain") for row in rows[kind]}
    assert not seen & {row["author"] for row in rows["holdout"]}
    assert {row["kind"] for row in rows["holdout"]} == {"sc"}
    cut = [row["question"] for row in rows["forget"] if row["kind"] == "sc"]
    assert {len(text.split()) for text in cut} == {5}
    assert len(rows["other"][0]["perturbed_answer"]) == 3


def test_rows_that_are_too_long_leave_too_few_documents(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.lume, "read", lambda table, folder: rows_of(table))
    with pytest.raises(ValueError, match=r"6 documents of Task1 .*got 3"):
        lume.rows(tmp_path, documents=3, words=5, max_words=64)
    with pytest.raises(ValueError, match=r"4 words .*got 0"):
        lume.rows(tmp_path, documents=1, words=5, max_words=4)


def test_the_score_of_the_original_the_retrained_and_a_collapsed_model(small):
    made = semeval.scorer(small, CONFIG.max_new_tokens)
    original, retrained, nothing = (
        semeval.official_score(made, params)
        for params in (small.params, small.retrained, semeval.collapsed(small.params))
    )
    assert original.mmlu == retrained.mmlu == 1.0 and made.floor == 0.75
    assert original.terms["retain", "Task2", "qa"] == 1.0
    assert (
        original.terms["forget", "Task2", "qa"] == 0.0 and original.task_aggregate == 0
    )
    assert retrained.terms["forget", "Task2", "qa"] > 0.5
    assert original.mia_auc == 1.0 and original.mia_score == 0.0
    assert 0.1 < retrained.mia_auc < 0.9
    # Uniform logits: no term of retain, no attack, MMLU by chance.
    assert nothing.task_aggregate == 0 and nothing.mia_score == 1.0
    assert nothing.mmlu == 0.25 and nothing.below_floor
    assert nothing.final == pytest.approx((0 + 1 + 0.25) / 3)
    logits = small.model.unembed(
        semeval.collapsed(small.params),
        small.model.apply(
            semeval.collapsed(small.params), tiny.tiny_batch(vocab=300)
        ).hidden,
    )
    assert not np.asarray(logits).any()
    broken = jax.tree.map(lambda x: x * jnp.nan, small.params)
    found = semeval.official_score(made, broken)
    assert found.mmlu == 0.0 and found.mia_score == 1.0


def test_ascent_and_retaining_take_turns_or_follow_each_other(small):
    """Which gradient the optimizer gets, by the weights that the combiner reports."""
    model, weight = small.model, {"forget": [], "retain": []}
    in_turns = semeval.in_turns(model, learning_rate=1e-3, forget=2, retain=1)
    in_sequence = semeval.in_sequence(model, learning_rate=1e-3, first=1)
    params = {"w": jnp.ones(2)}
    grads = {"forget": {"w": jnp.ones(2)}, "retain": {"w": -jnp.ones(2)}}
    for recipe, expected in ((in_turns, "ffrf"), (in_sequence, "frrr")):
        assert list(recipe.terms) == ["forget", "retain"]
        state = recipe.tx.init(params)
        for now in expected:
            update, state = recipe.tx.update(grads, state, params)
            weight = {k[len("weight/") :]: x for k, x in state[0].stats.items()}
            assert weight["forget"] == (now == "f") and weight["retain"] == (now == "r")
        if recipe is in_turns:
            assert float(update["w"][0]) < 0  # of ascent: down its gradient


def test_lines_hold_every_part(book):
    lines = book.lines
    assert [x["method"] for x in lines[:3]] == list(figures.REFERENCES)
    assert len(lines) == 3 + 2 and len(lines[-1]["terms"]) == 12
    for line in lines:
        parts = (line["task_aggregate"], line["mia_score"], line["mmlu"])
        assert line["final"] == pytest.approx(sum(parts) / 3)


def test_the_best_rate_is_above_the_floor_where_one_is():
    best = functools.partial(unlearn.best_rate, name="x", seed=0, score=semeval.rank)

    def line(rate, final, mmlu, below):
        found = dict(method="x", seed=0, rate=rate, final=final, mmlu=mmlu)
        return found | {"below_floor": below}

    high = [line(1e-3, 0.6, 0.2, True), line(5e-3, 0.3, 0.9, False)]
    assert best(high) == 5e-3
    low = [line(1e-3, 0.4, 0.4, True), line(5e-3, 0.41, 0.2, True)]
    assert best(low) == 1e-3


def test_the_page_is_a_leaderboard_with_the_collapsed_model(book, small):
    about = dict(parameters=1, world="w", versions={"jax": "1"}, **CONFIG._asdict())
    about |= semeval.about_world(small)
    content = {"about": about, "lines": book.lines}
    text = "\n".join(figures.readme({"small": content}))
    assert "0.417 of the final score (0.000, 1.000, 0.250)" in text
    assert text.index("**original**") < text.index("**collapsed**")
    assert "| BLUR-NPO |" in text and "forget Task2 qa" in text


def test_another_world_is_refused(small_world):
    with pytest.raises(ValueError, match="'biographies'"):
        semeval.scorer(small_world[1], 8)
