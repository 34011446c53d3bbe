# SPDX-License-Identifier: Apache-2.0
"""LLM Surgery in a tiny world: three sets of questions, what runs, the claims."""

import json

import jax
import numpy as np
import pytest

from experiments.small import biographies, score, unlearn
from experiments.surgery import figures as surgery_figures
from experiments.surgery import run as surgery
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAN = surgery.Plan(rates=(1e-3, 1e-2), seeds=(0, 1), steps=10, rows=8, asked=16)
ABOUT = dict(parameters=1, command="this", versions={"jax": "1"})


@pytest.fixture(scope="module")
def done(small_world, tmp_path_factory):
    """(file, lines)."""
    with jax.numpy_dtype_promotion("standard"):
        file = tmp_path_factory.mktemp("surgery") / "surgery.jsonl"
        return file, surgery.run(small_world[1], file, plan=PLAN)


def test_new_biographies_contradict_the_old_ones():
    old = biographies.rows(forget=6, retain=1)["forget"]
    new = biographies.fictitious(old)
    assert new == biographies.fictitious(old) != biographies.fictitious(old, seed=1)
    for a, b in zip(old, new, strict=True):
        assert (a["author"], a["question"]) == (b["author"], b["question"])
        options = [b["paraphrased_answer"], *b["perturbed_answer"]]
        assert len(set(options)) == 6 and a["answer"] != b["answer"]
        assert a["paraphrased_answer"] not in options
    with pytest.raises(ValueError, match="rows of biographies.rows, got the question"):
        biographies.fictitious([{"author": "Nobody", "question": "Who?"}])


def test_the_likeliest_option_by_its_mean_token_is_chosen():
    model, params = tiny.tiny_model()
    rows = tiny.tiny_batch(6, 12)
    table = {name: np.asarray(x) for name, x in rows.items()}
    logps = jax.nn.log_softmax(model.unembed(params, model.apply(params, rows).hidden))[
        :, :-1
    ]
    each = np.take_along_axis(logps, table["tokens"][:, 1:, None], -1)[..., 0]
    where = table["answer"][:, 1:]
    means = np.where(where, each, 0).sum(1) / where.sum(1)
    wanted = means.reshape(2, 3).argmax(1)
    assert score.chosen_options(model, params, table, 3).tolist() == wanted.tolist()
    broken = jax.tree.map(lambda x: x * np.nan, params)
    assert score.chosen_options(model, broken, table, 3).tolist() == [-1, -1]


def test_the_sets_are_asked_apart(small_world):
    _, small = small_world
    asked = surgery.choices(small, 5)
    assert {name: len(x["tokens"]) for name, x in asked.items()} == dict.fromkeys(
        surgery.SETS, 15
    )
    streams = surgery.tables(small)
    assert len(streams["update"]["tokens"]) == len(streams["forget"]["tokens"])
    assert (streams["update"]["tokens"] != streams["forget"]["tokens"]).any(1).all()
    before = surgery.ask(small, small.params, surgery.choices(small, 16))
    assert before["unlearn"] > before["update"]


def test_every_method_runs_at_every_rate_and_its_best_on_all_seeds(done):
    file, lines = done
    names = [surgery.BASELINE, *surgery.known(500)]
    for name in names:
        own = [x for x in lines if x["method"] == name]
        assert sorted((x["seed"], x["rate"]) for x in own) == [
            (0, 1e-3),
            (0, 1e-2),
            (1, surgery.best(lines, name, PLAN)),
        ]
    assert len(lines) == 2 + 3 * len(names)
    assert [json.loads(x) for x in file.read_text().splitlines()[1:]] == lines


def test_the_baseline_learns_the_new_and_surgery_unlearns(done):
    by_key = {x["key"]: x for x in done[1]}
    before = by_key["before"]["accuracy"]
    assert by_key["baseline 0.01 0"]["accuracy"]["update"] > before["update"]
    strong = by_key["surgery 0.01 0"]["accuracy"]
    assert strong["unlearn"] < before["unlearn"]


def test_a_run_that_was_stopped_goes_on(done, small_world, tmp_path, monkeypatch):
    file, lines = done
    part = tmp_path / "part.jsonl"
    part.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    ran, run = [], unlearn.run
    monkeypatch.setattr(
        unlearn, "run", lambda made, **how: (ran.append(how), run(made, **how))[1]
    )
    again = surgery.run(small_world[1], part, plan=PLAN)
    assert len(ran) == 1
    assert again[-1] | {"seconds": 0} == lines[-1] | {"seconds": 0}
    with pytest.raises(ValueError, match="Move it away"):
        surgery.run(small_world[1], part, plan=PLAN._replace(steps=3))


def test_a_world_of_other_facts_is_refused(small_world, tmp_path):
    small = small_world[1]
    config = {"facts": {"source": "tofu"}}
    other = small._replace(about={**small.about, "config": config})
    with pytest.raises(ValueError, match="world of biographies.*got 'tofu'"):
        surgery.run(other, tmp_path / "x.jsonl", plan=PLAN)


def test_the_page_states_the_three_claims(done, tmp_path):
    def line(method, unlearn, update, retain, **more):
        found = dict(unlearn=unlearn, update=update, retain=retain)
        return {"key": method, "method": method, "accuracy": found, **more}

    lines = [
        line("before", 0.9, 0.3, 0.8),
        line("surgery", 0.5, 0.5, 0.8, rate=0.1, seed=0),
        line("surgery", 0.3, 0.7, 0.6, rate=0.1, seed=1),
        line("surgery", 0.9, 0.9, 0.9, rate=0.2, seed=0),
    ]
    about = {"world": "w", **PLAN._asdict(), **ABOUT}
    surgery_figures.write(lines, about, tmp_path / "surgery_small")
    page = (tmp_path / "surgery_small.md").read_text()
    assert "| surgery | 0.1 | 2 | 0.400 ± 0.100 | 0.600 ± 0.100 | 0.700 ± 0.1" in page
    assert "unlearn -0.500, update +0.300 (the paper's +0.2 is reached)" in page
    surgery_figures.write(done[1], about, tmp_path / "surgery_small")
    assert (tmp_path / "surgery_small.png").stat().st_size > 0
