# SPDX-License-Identifier: Apache-2.0
"""Retraining on T in a tiny world: what runs, what goes on, what is made of it."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.rtt import (
    small as attack,
)
from experiments.rtt import (
    small_facts as attack_facts,
)
from experiments.rtt import (
    small_figures as attack_figures,
)
from experiments.rtt import (
    small_score as attack_score,
)
from experiments.small import biographies, unlearn

pytestmark = pytest.mark.usefixtures("standard_promotion")
PLAN = attack_facts.Plan(
    rates=dict.fromkeys(attack.METHODS, (1e-4, 3e-3)),
    seeds=(0, 1),
    steps=8,
    rows=4,
    facts=16,
    folds=2,
    attack=(1e-4, 3e-3),
    epochs=2,
    batch=8,
    bound=10.0,
    late=(30, 1e-2),
    asked=dict(forget=8, retain=8),
)


@pytest.fixture(scope="module")
def few():
    """Two methods are enough."""
    with pytest.MonkeyPatch.context() as patch:
        names = {k: attack.METHODS[k] for k in ("NPO", "incorrect answer")}
        patch.setattr(attack, "METHODS", names)
        patch.setattr(attack, "LATE", ("NPO",))
        yield


@pytest.fixture(scope="module")
def done(few, small_world, tmp_path_factory):
    file = tmp_path_factory.mktemp("lines") / "attack.jsonl"
    with jax.numpy_dtype_promotion("standard"):
        return file, attack.experiment(small_world[1], file, plan=PLAN)


def test_all_are_attacked_on_every_fold(done):
    lines = done[1]
    own = {(x["who"], x["seed"], x["fold"]) for x in lines if x["kind"] == "rtt"}
    wanted = {
        (who, 0, fold)
        for who in (*attack_score.REFERENCES, "finetuned NPO")
        for fold in (0, 1)
    }
    wanted |= {
        (who, seed, fold)
        for who in ("NPO", "incorrect answer")
        for seed in (0, 1)
        for fold in (0, 1)
    }
    assert own == wanted
    for x in lines:
        if x["kind"] == "rtt":
            for measure in attack_score.MEASURES:
                count = 2 if x["seed"] == 0 else 1  # swept on the first seed
                assert np.shape(x[measure]) == (count, 3)
                assert np.shape(x["losses"]) == (count, 2)
            assert x["facts"] == 8
    swept = [x for x in lines if x["kind"] == "unlearned"]
    assert {(x["base"], x["method"], x["seed"]) for x in swept} == {
        ("pretrained", "NPO", 0),
        ("pretrained", "NPO", 1),
        ("pretrained", "incorrect answer", 0),
        ("pretrained", "incorrect answer", 1),
        ("finetuned", "NPO", 0),
    }


def test_who_knows_is_told_from_who_does_not(done):
    lines = done[1]

    def verbatim(who, at):
        own = [x for x in lines if x["kind"] == "rtt" and x["who"] == who]
        return np.mean([x["verbatim"][0][at] for x in own])

    assert verbatim("original", 0) > 0.5 > verbatim("twin", 0)
    assert verbatim("finetuned original", 0) > verbatim("twin", 0) + 0.2
    assert verbatim("never seen", 0) < 0.5


def test_what_was_stopped_goes_on(done, small_world, tmp_path, monkeypatch):
    file, lines = done
    text = file.read_text().splitlines(keepends=True)
    part = tmp_path / "attack.jsonl"
    part.write_text("".join(text[:-2]) + text[-2][:40])  # cut off while writing
    ran = []
    retrain = attack_facts.retrain
    monkeypatch.setattr(
        attack_facts, "retrain", lambda *x: (ran.append(x[3]), retrain(*x))[1]
    )
    again = attack.experiment(small_world[1], part, plan=PLAN)
    assert [x["key"] for x in again] == [x["key"] for x in lines]
    assert len(ran) == 2
    for a, b in zip(again[-2:], lines[-2:], strict=True):
        assert_allclose(a["verbatim"], b["verbatim"], atol=1e-5)
    with pytest.raises(ValueError, match="Move it away"):
        attack.experiment(small_world[1], part, plan=PLAN._replace(epochs=3))


def test_no_run_begins_when_time_is_up(few, small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(unlearn, "run", lambda *x, **y: pytest.fail("ran"))
    now = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(attack.time, "monotonic", lambda: next(now))
    file = tmp_path / "attack.jsonl"
    lines = attack.experiment(small_world[1], file, plan=PLAN, minutes=1)
    assert [x["key"] for x in lines] == ["rtt original 0 0"]


def test_wrong_answers_are_worded_as_the_right_one():
    rows = biographies.rows(forget=3, retain=1)["forget"]
    for row in rows:
        wrong = biographies.wrong_answers(row)
        assert len(set(wrong)) == 5 and row["answer"] not in wrong
        start = row["answer"][:8]
        assert all(text.startswith(start) and text.endswith(".") for text in wrong)
    assert biographies.wrong_answers(rows[0] | {"question": "Who?"}) is None


def test_tables_are_as_long_as_the_longest_refusal(small_world):
    small = small_world[1]
    short = small._replace(about={**small.about, "length": 8})
    found = unlearn.tables(short)
    assert len({own["tokens"].shape[1] for own in found.values()}) == 1
    rows = found["refusal"]
    told = rows["tokens"][1][rows["answer"][1]]
    assert small.tokenizer.decode(told).strip() == unlearn.REFUSALS[1] + "</s>"


def test_nobody_told_is_among_those_never_seen(small_world):
    small = small_world[1]
    never = attack_facts.never_seen(small, PLAN)
    told = {row["author"] for rows in small.questions.values() for row in rows}
    assert not told & {row["author"] for row in never} and len(never) >= PLAN.facts


def test_the_rate_is_the_strongest_within_the_bound():
    def run(rate, forget, retain, finite=True):
        return dict(
            rate=rate, forget_probability=forget, retain_loss=retain, finite=finite
        )

    swept = [
        run(1, 0.9, 0.1),
        run(2, 0.3, 0.35),
        run(3, 0.0, 0.9),
        run(4, 0, 0.1, False),
    ]
    assert attack.pick(swept, 0.4)["rate"] == 2
    assert attack.pick(swept, 1.0)["rate"] == 3
    assert attack.pick(swept[:3], 0.01)["rate"] == 1


def line(who, fold, *values, seed=0, **more):
    """A run with one row of `values` (before, after each epoch) a rate."""
    both = {m: [list(x) for x in values] for m in attack_score.MEASURES}
    shared = dict(kind="rtt", who=who, fold=fold, seed=seed, facts=50)
    rates = [1e-4, 3e-4][: len(values)]
    return shared | dict(rates=rates, finite=[True] * len(rates)) | both | more


def unlearned(base, method, rate=1e-3, seed=0, retain=0.3):
    return dict(
        key=f"unlearned {base} {method} {rate} {seed}",
        kind="unlearned",
        base=base,
        method=method,
        rate=rate,
        seed=seed,
        retain_loss=retain,
        forget_probability=0.1,
        retain_exact=0.9,
        facts=dict(choice=0.3, verbatim=0.1),
    )


def made(late, before=0.3):
    """NPO on two seeds and folds; what was finetuned in comes back to `late`."""
    lines = [unlearned("pretrained", "NPO"), unlearned("finetuned", "NPO")]
    lines.append(unlearned("pretrained", "NPO", seed=1, retain=0.5))
    for fold in (0, 1):
        lines += [
            line("original", fold, (1.0, 0.9)),
            line("twin", fold, (0.2, 0.2)),
            line("NPO", fold, (before, 0.8), rate=1e-3),
            line("NPO", fold, (before, 0.6), seed=1, rate=1e-3),
            line("finetuned original", fold, (0.8, 0.7)),
            line("finetuned NPO", fold, (0.2, late), rate=1e-3),
        ]
    return lines


def judged(lines):
    rows = attack_score.summarise(lines)
    return rows, attack_score.claim(lines, rows)


def test_later_seeds_are_attacked_at_the_best_rate():
    def swept(fold, *values, seed=0):
        return dict(
            kind="rtt", who="NPO", seed=seed, rates=[1, 2], fold=fold, verbatim=values
        )

    lines = [swept(0, (0.1, 0.9), (0.2, 0.5)), swept(1, (0.1, 0.1), (0.7, 0.6))]
    assert attack.best_rates(lines, "NPO") == [2]
    assert attack.best_rates(lines[:1] + [swept(0, (0, 0), (1, 1), seed=1)], "NPO") == [
        1
    ]


def test_recovery_by_hand():
    rows = {row["who"]: row for row in attack_score.summarise(made(0.5))}
    own = rows["NPO"]["verbatim"]
    assert_allclose(own["before"], [0.3, 0.0], atol=1e-9)
    assert_allclose(own["last"], [0.7, np.std([0.8, 0.6], ddof=1)])
    assert_allclose(own["recovery"][0], 0.7 / 1.0)
    assert_allclose(own["above"][0], (0.6 / 0.8 + 0.4 / 0.8) / 2)
    assert_allclose(own["returned"], (0.7 - 0.3) / (0.9 - 0.3))  # folds are alike
    assert_allclose(own["best_returned"], (0.7 - 0.3) / (1.0 - 0.3))
    assert_allclose(own["left"], 0.1 / 0.8)
    assert own["forgot"]
    late = rows["finetuned NPO"]["choice"]
    assert_allclose(late["above"][0], 0.3 / 0.6)
    assert_allclose(late["returned"][0], 0.3 / 0.5)
    assert rows["NPO"]["seeds"] == [0, 1] and rows["NPO"]["folds"] == 4
    assert_allclose(rows["NPO"]["retain_loss"], 0.4)


def test_folds_count_by_their_facts():
    lines = made(0.5)
    for x in lines:
        if x.get("fold") == 1:
            x["facts"] = 150
        if (x.get("fold"), x.get("who"), x.get("seed")) == (1, "NPO", 0):
            x["choice"] = [[0.7, 0.9]]
    row = next(x for x in attack_score.summarise(lines) if x["who"] == "NPO")
    before = (0.3 + 0.25 * 0.3 + 0.75 * 0.7) / 2
    after = (0.25 * 0.8 + 0.75 * 0.9 + 0.6) / 2
    assert_allclose(row["choice"]["before"][0], before)
    value, low, high = row["choice"]["returned"]
    assert_allclose(value, (after - before) / (0.9 - before))
    assert low < value < high


def test_what_was_never_gone_does_not_come_back():
    """A method that forgets nothing has the paper's full recovery, and no verdict."""
    rows, told = judged(made(0.5, before=1.0))
    own = next(row for row in rows if row["who"] == "NPO")["choice"]
    assert own["left"] == 1.0 and not own["forgot"] and own["recovery"][0] == 1.0
    assert own["returned"] is None and "choice" not in told["most_returns"]
    text = "\n".join(attack_figures._answers(told, rows))
    assert "still have 100% of what" in text and "by none of them" in text
    assert "in pretraining, by choice: nothing was lost" in text
    assert "- The paper's claim: not measured" in text
    rows, told = judged(made(0.25, before=0.65))
    text = "\n".join(attack_figures._answers(told, rows))
    assert "; most was never gone" in text and "the smaller part that was lost" in text
    table = "\n".join(attack_figures._numbers(rows))
    assert "| 56% (forgot less than half) |" in table and "| 0% |" in table


@pytest.mark.parametrize(
    ("late", "before", "first", "second", "whole"),
    [
        (0.25, 0.3, "holds", "holds", "holds here"),
        (0.6, 0.3, "holds", "fails", "does not hold as a whole here"),
        (0.25, 0.6, "fails", "holds", "does not hold as a whole here"),
    ],
)
def test_the_claim_is_read_off_what_was_lost(late, before, first, second, whole):
    told = judged(made(late, before))[1]
    assert told["most_returns"] == dict.fromkeys(attack_score.MEASURES, first)
    assert told["much_less"] == dict.fromkeys(attack_score.MEASURES, second)
    assert told["alike"] == {"methods": ["NPO"], "seeds": [0]}  # what both bases have
    claim = attack_figures._claim(told)
    assert claim.startswith(whole) and f"**{first}** by both measures" in claim


def test_half_a_claim_is_undecided():
    rows, told = judged([x for x in made(0.5) if "finetuned" not in x.get("who", "")])
    assert told["most_returns"]["choice"] == "holds" and not told["less"]
    claim = attack_figures._claim(told)
    assert claim.startswith("undecided here") and "does was not measured" in claim


def test_one_fold_decides_nothing():
    told = judged([x for x in made(0.25) if x.get("fold", 0) == 0])[1]
    assert told["returned"]["original"]["choice"][0] > 0.6
    assert {*told["most_returns"].values(), *told["much_less"].values()} == {
        "undecided"
    }


def test_the_rate_of_the_last_epoch_is_chosen_on_other_folds():
    lines = [
        line("NPO", 0, (0.1, 0.9, 0.8), (0.1, 0.3, 0.2)),
        line("NPO", 1, (0.1, 0.2, 0.3), (0.1, 0.2, 0.7)),
    ]
    held = attack_score.held_out(lines, "choice")
    assert (held[0, 0]["last"], held[0, 1]["last"]) == (0.2, 0.3)
    assert (held[0, 0]["best"], held[0, 1]["best"]) == (0.9, 0.7)
    assert attack_score.held_out(lines[:1], "choice")[0, 0]["last"] == 0.8  # no other


def test_controls_are_judged_by_the_last_epoch():
    """The best of rates and epochs is far from chance, no last epoch is."""
    lines = made(0.5)
    for fold, best in ((0, (0.9, 0.2)), (1, (0.2, 0.9))):
        rates = [(0.25, best[0], 0.28), (0.25, best[1], 0.22)]
        lines.append(line("never seen", fold, *rates))
    row = attack_score.summarise(lines)[-1]
    first, second = row["controls"]
    assert_allclose([first["last"][0], second["last"][0]], [0.28, 0.22])
    assert_allclose(first["last"][1:], [0.201, 0.375], atol=1e-3)  # Wilson's, of 100
    assert not first["told_from_chance"] and not second["told_from_chance"]
    text = attack_figures._controlled(row)
    assert "28% [20%, 37%] at rate 0.0001 (not told from chance)" in text
    assert "which chance favours, in 90%" in text
    for x in lines[-2:]:
        x["choice"][1][-1] = 0.5
    row = attack_score.summarise(lines)[-1]
    assert row["controls"][1]["told_from_chance"]
    assert "at rate 0.0003 (away from chance)" in attack_figures._controlled(row)


def test_the_page_says_what_ran_and_how_far_losses_match():
    lines = made(0.5)
    lines.append(unlearned("finetuned", "NPO", rate=2e-3, retain=0.9))
    rows = attack_score.summarise(lines)
    (text,) = attack_figures._parts(rows)
    assert "original, twin, finetuned original, finetuned NPO: seed 0, 2 att" in text
    assert "; NPO: seeds 0, 1, 4 attacks. To save time" in text
    text = attack_figures._matched(lines, {"bound": 0.4}, rows)
    assert "0.300 to 0.400 nats a token (NPO 0.400, finetuned NPO 0.300)" in text
    assert "single seeds: NPO seed 1 (0.500). So strengths" in text
    assert "on the first seed with NPO; a larger one was not tried" in text
    text = "\n".join(attack_figures._sweep(lines, {"bound": 0.4}, rows))
    assert "| 0.90 | taken, over the bound |" in text
    assert "| 0.90 | over the bound |" in text


def test_tables_and_plot(done, small_world, tmp_path):
    small, lines = small_world[1], done[1]
    about = attack.head(small, PLAN) | {"parameters": small.about["parameters"]}
    place = tmp_path / "relearn_small"
    attack_figures.write(lines, about, place)
    assert place.with_suffix(".png").stat().st_size > 5000
    text = place.with_suffix(".md").read_text()
    assert (
        "- The paper's claim, judged by the few attacks" in text
        and "| **twin** |" in text
    )
    assert "8 of 20 attacks on unlearned models" in text  # two methods of five ran
    few = attack_figures._ran(lines, about | {"rates": dict.fromkeys(("NPO", "RMU"))})
    assert "4 of 8" in few[0] and "none yet of RMU" in few[0]
    assert not attack_figures._ran(lines, about | {"rates": {"NPO": None}})
    whole = json.loads(place.with_suffix(".json").read_text())
    assert len(whole["summary"]) == 7 and len(whole["runs"]) == len(lines)
