# SPDX-License-Identifier: Apache-2.0
"""MRP against others in a tiny world: topics, attackers, what is taken up again."""

import json

import jax
import numpy as np
import pytest

from experiments.mrp import figures as mrp_figures
from experiments.mrp import run as mrp
from experiments.small import unlearn
from jaxunlearn import evaluate

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAN = mrp.Plan(
    methods={"mrp.graddiff": (1.0,), "openunlearning.npo": (3e-3, 1e-2)},
    seeds=(0,),
    steps=6,
    rows=4,
    places={"mlp_out": (0, 1)},
    count=2,
    num_protected=4,
    asked=5,
    curve=(0, 3),
    rates=(1e-3,),
)
ABOUT = dict(parameters=1, command="this", versions={"jax": "1"}, forgotten=0.1)


@pytest.fixture(scope="module")
def world_of_three(small_world):
    """The tiny world, its rows to forget said to be about three authors."""
    small = small_world[1]
    rows = [
        row | {"author": f"author {i // 6}"}
        for i, row in enumerate(small.questions["forget"])
    ]
    return small._replace(questions={**small.questions, "forget": rows})


@pytest.fixture(scope="module")
def done(world_of_three, tmp_path_factory):
    """(file, lines)."""
    with jax.numpy_dtype_promotion("standard"):
        file = tmp_path_factory.mktemp("mrp") / "mrp.jsonl"
        return file, mrp.run(world_of_three, file, plan=PLAN)


def test_topics_share_no_author_and_leave_none_out(world_of_three):
    rows = world_of_three.questions["forget"]
    found = mrp.topics(rows)
    authors = [{row["author"] for row in each} for each in found.values()]
    assert list(map(len, found.values())) == [6, 6, 4]
    assert len(set.union(*authors)) == sum(map(len, authors)) == 3
    with pytest.raises(ValueError, match="at least 3 authors .* got 1"):
        mrp.topics(rows[:6])


def test_answers_are_scored_by_their_sets(world_of_three):
    own = mrp.lab(world_of_three, PLAN)
    found = mrp.ask(own, world_of_three.model, world_of_three.params)
    assert set(found) == {"A", "B", "C", "retain", "known", "held out"}
    logps, lengths = evaluate.answer_logps(
        world_of_three.model, world_of_three.params, own.streams["B"]["forget"]
    )
    wanted = np.exp(logps / lengths)[: PLAN.asked].mean()
    np.testing.assert_allclose(found["B"]["probability"], wanted, rtol=1e-4)


def test_every_method_forgets_three_topics_and_is_attacked(done):
    file, lines = done
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    for name in ("mrp.graddiff", "openunlearning.npo"):
        assert [f"stage {name} 0 {topic}" in keys for topic in "ABC"] == [True] * 3
        assert f"attack {name} full 0.001 0" in keys
        assert f"attack {name} lora 0.001 0" in keys
    assert "attack mrp.graddiff held 0.001 0" in keys
    assert "attack twin full 0.001 0" in keys
    by_key = {line["key"]: line for line in lines}
    exact = by_key["exact 0"]
    assert exact["folded"] < 1e-4 and exact["idempotent"] < 1e-6
    assert exact["directions"] == 3 * 2 * 2
    # Left out, the projections have changed nothing.
    bare = by_key["attack mrp.graddiff unwrapped 0"]["curve"]["0"]
    assert bare == by_key["untouched 0"]["scores"]
    # The attack begins where unlearning ended, and folding changes no score.
    for name in ("mrp.graddiff", "openunlearning.npo"):
        end = by_key[f"stage {name} 0 C"]["scores"]
        begins = by_key[f"attack {name} full 0.001 0"]["curve"]
        for rows, each in begins["0"].items():
            assert each["probability"] == pytest.approx(
                end[rows]["probability"], abs=1e-4
            )
        known = [begins[step]["known"]["probability"] for step in ("0", "3")]
        assert known[1] > known[0]
    assert [json.loads(x) for x in file.read_text().splitlines()[1:]] == lines


def test_the_lowest_rate_that_forgets_is_taken():
    def line(rate, probability, finite=True):
        scores = {"A": {"probability": probability}}
        key = f"sweep openunlearning.npo {rate:.3g}"
        return {"key": key, "rate": rate, "finite": finite, "scores": scores}

    name = "openunlearning.npo"
    assert mrp.rate_of([], name, PLAN) == (None, False)
    assert mrp.rate_of([line(3e-3, 0.05)], name, PLAN) == (3e-3, True)
    assert mrp.rate_of([line(3e-3, 0.5)], name, PLAN) == (None, False)
    both = [line(3e-3, 0.5), line(1e-2, 0.4)]
    assert mrp.rate_of(both, name, PLAN) == (1e-2, False)
    broken = [line(3e-3, 0.5), line(1e-2, 0.0, finite=False)]
    assert mrp.rate_of(broken, name, PLAN) == (3e-3, False)


def test_a_run_that_was_stopped_repeats_only_what_it_lacks(
    done, world_of_three, tmp_path, monkeypatch
):
    file, lines = done
    text = file.read_text().splitlines(keepends=True)
    (cut,) = [i for i, x in enumerate(text) if '"stage openunlearning.npo 0 B"' in x]
    part = tmp_path / "mrp.jsonl"
    part.write_text("".join(text[:cut]))
    ran, run = [], unlearn.run
    monkeypatch.setattr(
        unlearn, "run", lambda made, **how: (ran.append(how), run(made, **how))[1]
    )
    again = mrp.run(world_of_three, part, plan=PLAN)
    assert len(ran) == 3 + 2  # topics, then attackers
    drop = ("seconds",)
    plain = [
        sorted(
            ({k: v for k, v in x.items() if k not in drop} for x in each),
            key=lambda x: x["key"],
        )
        for each in (again, lines)
    ]
    assert plain[0] == plain[1]
    with pytest.raises(ValueError, match="Move it away"):
        mrp.run(world_of_three, part, plan=PLAN._replace(count=3))


def test_the_page_says_what_the_lines_say(done, tmp_path):
    about = {**json.loads(done[0].read_text().splitlines()[0]), **ABOUT}
    mrp_figures.write(done[1], about, tmp_path / "mrp_small")
    page = (tmp_path / "mrp_small.md").read_text()
    stage = {line["key"]: line for line in done[1]}["stage mrp.graddiff 0 C"]
    cells = [
        f"{stage['scores'][x]['exact']:.2f} ({stage['scores'][x]['probability']:.2f})"
        for x in ("A", "B", "C", "retain")
    ]
    assert f"| mrp.graddiff | 1 | C | {' | '.join(cells)} |" in page
    assert "projections left out" in page and "bar 1e-4" in page
    assert (tmp_path / "mrp_small.png").stat().st_size > 0
    found = json.loads((tmp_path / "mrp_small.json").read_text())
    assert found["summary"]["attacks"]
    swept = [x for x in done[1] if x["key"].startswith("sweep")]
    mrp_figures.write(swept, about, tmp_path / "mrp_small")
    page = (tmp_path / "mrp_small.md").read_text()
    assert "no attack had run" in page and "| openunlearning.npo | 0.003 |" in page
