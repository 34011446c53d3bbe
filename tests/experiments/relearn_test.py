# SPDX-License-Identifier: Apache-2.0
"""Retraining on T in a tiny decoder: how facts are chosen, what runs, what is said."""

import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy.testing import assert_allclose, assert_array_equal

from experiments.rtt import config_smollm2 as relearn_smollm2
from experiments.rtt import (
    score as relearn_score,
)
from experiments.rtt import (
    smollm2 as relearn,
)
from experiments.rtt import (
    smollm2_facts as relearn_facts,
)
from experiments.rtt import (
    smollm2_figures as relearn_figures,
)
from experiments.small import unlearn
from jaxunlearn import attacks
from jaxunlearn.data import capitals as facts
from jaxunlearn.data.benchmarks import rtt_facts
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
METHODS = ("incorrect", "rmu")


def small_config(folder, **more):
    c = relearn_smollm2.get_config()
    c.output = str(folder)
    for told in c.told.values():
        told.update(steps=30, rows=8, learning_rate=1e-2)
    rates = more.pop("rates", {name: (1e-2, 1e-4) for name in relearn.METHODS})
    c.rates = ConfigDict(rates)  # in the place of all
    sizes = dict(length=64, facts=6, folds=3, kept=4, scanned=40, steps=4, rows=2)
    c.update(sizes | dict(bound=1e-3, attack=1e-3, epochs=2, batch=2) | more)
    return c


def questions(count=60):
    """Sums with wrong results."""
    rows, draw = [], np.random.default_rng(0)
    for i in range(count):
        choices = [str(x) for x in draw.choice(100, 4, replace=False)]
        row = {"question": f"What is {i} and {i + 3}?", "choices": choices}
        rows.append(row | {"answer": i % 4})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model, params, tokenizer, questions); some capitals and sums were taught."""
    texts = [f"When was {row['name']} born?" for row in rtt_facts.birthdays(folds=1)]
    texts += [f"What is the capital of {fact.subject}?" for fact in facts.capitals()]
    tokenizer = tiny.tiny_tokenizer(texts, vocab=600)
    sizes = dict(width=32, layers=8, head_dim=8, positions=96)
    model, params = tiny.tiny_model(vocab=len(tokenizer), **sizes)
    rows = [{**row, "stem": row["question"]} for row in questions()]
    taught = [row for each in relearn_facts.capitals() for row in each[:8]]
    how = small_config("").told.birthdays
    how.steps = 96
    with jax.numpy_dtype_promotion("standard"):
        params = relearn_facts.taught(
            model,
            params,
            tokenizer,
            [*taught, *rows[:16]],
            how,
            64,
            tmp_path_factory.mktemp("taught") / "model",
        )
    return model, params, tokenizer, rows


@pytest.fixture(scope="module")
def few():
    """Two methods are enough: one that reads wrong answers, one with a reference."""
    with pytest.MonkeyPatch.context() as patch:
        own = {name: relearn.METHODS[name] for name in METHODS}
        patch.setattr(relearn, "METHODS", own)
        yield


@pytest.fixture(scope="module")
def done(few, world, tmp_path_factory):
    """(folder, config, lines)."""
    folder = tmp_path_factory.mktemp("relearn")
    config = small_config(folder)
    with jax.numpy_dtype_promotion("standard"):
        return folder, config, relearn.experiment(*world, config)


def attacked(lines):
    return [line for line in lines if line["kind"] == "rtt"]


def test_all_are_attacked_on_the_folds_of_the_seed(done):
    own = {(x["of"], x["who"], x["fold"]) for x in attacked(done[2])}
    wanted = {
        (of, who, fold)
        for of in relearn.KINDS
        for who in ("original", *METHODS)
        for fold in (0, 1)
    }
    assert own == wanted | {("birthdays", "untold", fold) for fold in (0, 1, 2)}
    for line in attacked(done[2]):
        assert np.shape(line["hits"]) == (3, 2) and np.shape(line["losses"]) == (2,)
    config = small_config(done[0], seeds=(4, 7), folds=5)
    assert relearn.rotations(config, 4) == [0, 1]
    assert relearn.rotations(config, 7) == [2, 3]


def test_the_largest_rate_within_the_bound_is_attacked(done):
    lines = done[2]
    base = {x["of"]: x for x in lines if x["kind"] == "facts"}
    for of in relearn.KINDS:
        for who in METHODS:
            runs = [
                x
                for x in lines
                if (x["kind"], x["of"], x.get("who")) == ("unlearned", of, who)
            ]
            assert [x["rate"] for x in runs] in ([1e-2], [1e-2, 1e-4])
            within = [rise(x, base[of]) <= 1e-3 for x in runs]
            assert not any(within[:-1])
            best = min(runs, key=lambda x, of=of: rise(x, base[of]))
            assert best is runs[-1] or not within[-1]
            rates = {x["rate"] for x in attacked(lines) if _who(x) == (of, who)}
            assert rates == {best["rate"]}


def _who(line):
    return line["of"], line["who"]


def rise(line, before):
    return max(line[k] - before[k] for k in ("retain_loss", "prose_loss"))


def test_birthdays_are_known_once_they_are_told(done, world):
    lines = done[2]
    (told,) = [x for x in lines if x["key"] == "facts birthdays"]
    assert told["choice"] == 1 and list(done[0].glob("told-*/config.json"))
    first = [x for x in attacked(lines) if x["who"] == "untold"]
    assert len(first) == 3  # the plain model is asked every fold
    hits = np.concatenate([x["hits"][0] for x in first])
    model, params, tokenizer, _ = world
    forget, _ = relearn_facts.birthdays(done[1])
    columns = attacks.encode_questions(
        model, tokenizer, forget, "choice", prompt=relearn_facts.PROMPT
    )
    assert hits.mean() == relearn_facts.known(model, params, columns)["choice"]


def test_facts_of_pretraining_are_the_surest_of_those_answered_right(done, world):
    model, params, tokenizer, rows = world
    right, about = relearn_facts.choose(model, params, tokenizer, rows)
    assert about == {"asked": 60, "right": len(right)} and 16 <= len(right) < 50
    columns = attacks.encode_questions(model, tokenizer, right, "choice")
    logps = relearn_facts.option_logps(model, params, columns, rows=10)
    assert_array_equal(logps.argmax(1), columns["right"])
    margins = logps.max(1) - np.sort(logps, 1)[:, -2]
    assert (np.diff(margins) <= 1e-6).all()
    (line,) = [x for x in done[2] if x["key"] == "facts mmlu"]
    assert line["asked"] == 40 and 12 <= line["right"] and line["facts"] == 6


def test_questions_of_mmlu_stand_alone_and_are_short(world):
    tokenizer, good = world[2], questions(1)[0]
    poor = [
        good | {"question": "Which of the following is a sum?"},
        good | {"question": "A sum is"},
        good | {"question": "What is " + "very " * 30 + "long?"},
        good | {"choices": ["1", "2", " 1", "3"]},
        good | {"choices": ["1", "2", "All of the above", "3"]},
        good | {"choices": ["1", "2", "an answer of a great many tokens", "3"]},
        good,
    ]
    (only,) = relearn_facts.short([*poor, good], tokenizer, 48)
    assert only["question"] == good["question"] and only["answer"] == good["answer"]


def test_what_was_stopped_goes_on(done, few, world, tmp_path, monkeypatch):
    folder, config, lines = done
    text = (folder / "relearn.jsonl").read_text().splitlines(keepends=True)
    part = tmp_path / "relearn.jsonl"
    part.write_text("".join(text[:-2]) + text[-2][:40])  # cut off while writing
    for place in (*folder.glob("told-*"), folder / "unlearned"):
        (tmp_path / place.name).symlink_to(place)
    ran, run = [], unlearn.run
    monkeypatch.setattr(
        unlearn, "run", lambda *x, **y: (ran.append(y), run(*x, **y))[1]
    )
    again = config.copy_and_resolve_references()
    again.output = str(tmp_path)
    found = relearn.experiment(*world, again)
    assert [x["key"] for x in found] == [x["key"] for x in lines]
    assert not ran  # what was unlearned is there
    for a, b in zip(found[-2:], lines[-2:], strict=True):
        assert a["hits"] == b["hits"]
        assert_allclose(a["losses"], b["losses"], rtol=1e-4)
    again.epochs = 3
    with pytest.raises(ValueError, match="Move it away"):
        relearn.experiment(*world, again)


def test_no_run_begins_when_time_is_up(few, world, done, tmp_path, monkeypatch):
    now = iter([0.0, 0.0, 61.0])
    clock = SimpleNamespace(**vars(time) | {"monotonic": lambda: next(now)})
    monkeypatch.setattr(relearn, "time", clock)
    config = small_config(tmp_path)
    lines = relearn.experiment(*world, config, minutes=1)
    assert [x["key"] for x in lines] == ["facts capitals", "rtt capitals original 0 0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(steps=0), "steps >= 1"),
        (dict(rotations=4), "1 <= rotations <= folds"),
        (dict(facts=3), "needs 6 facts that the model knows"),
    ],
)
def test_what_cannot_be_run_is_refused(done, few, world, tmp_path, more, message):
    config = small_config(tmp_path, **more)
    with pytest.raises(ValueError, match=message):
        relearn.experiment(*world, config)
    with pytest.raises(ValueError, match="needs rates of"):
        relearn.experiment(*world, small_config(tmp_path, rates={"rmu": (1e-4,)}))


def made(early, late, *, choice=0.3, facts=40):
    """Lines of one method on two kinds: so many right of `facts` after the attack."""
    lines = []
    for of, right in (("capitals", early), ("birthdays", late)):
        shared = dict(of=of, seed=0, choice=choice, retain_loss=1.0, prose_loss=3.0)
        shared |= dict(retain_choice=1.0)
        lines.append(
            shared
            | dict(key=f"facts {of}", kind="facts", choice=1.0, probability=0.5)
            | dict(facts=facts, kept=5)
            | (dict(asked=80, right=60) if of == "capitals" else {})
        )
        lines.append(
            shared
            | dict(key="u", kind="unlearned", who="npo", rate=1e-4)
            | dict(forget_probability=0.1, retain_loss=1.05, finite=True)
        )
        for who, hits in (("original", facts), ("npo", right)):
            row = [1] * hits + [0] * (facts - hits)
            key = f"rtt {of} {who} 0 0"
            line = dict(key=key, kind="rtt", of=of, who=who, seed=0, fold=0)
            line |= dict(hits=[[0] * facts, row], losses=[1.0], core_seconds=60.0)
            lines.append(line | (dict(rate=1e-4) if who == "npo" else {}))
    return lines


def test_recovery_by_hand():
    rows = relearn_score.summarise(made(30, 20))
    row = next(x for x in rows if (x["of"], x["who"]) == ("capitals", "npo"))
    assert row["forgot"] and row["facts"] == 40
    assert row["recovery"][0] == 0.75
    assert_allclose([row["above"][0], row["returned"][0]], 0.5 / 0.75)
    assert row["above"][1] < 0.6 < 0.7 < row["above"][2]
    assert_allclose(row["retain_rise"], 0.05)
    value, low, high = relearn_score.accuracy(np.array([1] * 5 + [0] * 15))
    assert value == 0.25
    assert_allclose([low, high], [0.112, 0.469], atol=1e-3)  # Wilson's


@pytest.mark.parametrize(
    ("early", "late", "words"),
    [
        (38, 14, ("holds", "holds", "holds in both halves here")),
        (38, 38, ("holds", "fails", "facts finetuned in: fails")),
        (
            14,
            12,
            ("fails", "undecided", "fails here (most comes back of capitals: fails"),
        ),
        (24, 18, ("undecided", "undecided", "undecided here")),
    ],
)
def test_the_claim_is_read_off_the_numbers(early, late, words):
    lines = made(early, late)
    told = relearn_score.claim(lines, relearn_score.summarise(lines))
    assert (told["most_returns"]["capitals"], told["much_less"]) == words[:2]
    assert words[2] in relearn_figures._whole(told)


def test_what_was_not_lost_cannot_come_back():
    lines = made(38, 38, choice=0.9)
    for line in lines:
        if line["kind"] == "rtt":
            line["hits"][0] = line["hits"][1]
    lines[3]["hits"][0] = [1] * 40  # the methods answer all, before as after
    lines[2]["hits"][1] = lines[3]["hits"][1]
    rows = relearn_score.summarise(lines)
    told = relearn_score.claim(lines, rows)
    assert "capitals" not in told["returned"] and "much_less" not in told
    text = "\n".join(relearn_figures._answers(lines, rows))
    assert "pretraining): nothing above chance was lost" in text
    assert "claim: not measured as a whole" in text


def test_below_chance_is_not_lost():
    means = np.array([0.5, 0.25, 0.0, 0.25, 1.0])  # two methods after, before; original
    assert_allclose(relearn_score.returned(means), 0.25 / 1.5)


def test_tables_and_plot(done, tmp_path):
    about = relearn.head(done[1]) | {"command": "this", "versions": {"jax": "1"}}
    about |= {"device": "cpu"}
    about["config"]["rates"]["npo"] = [1e-4]
    place = tmp_path / "relearn_smollm2"
    for lines in (done[2], made(38, 14)):
        relearn_figures.write(lines, about, place)
        assert place.with_suffix(".png").stat().st_size > 5000
        page = place.with_suffix(".md").read_text()
        assert "The paper's claim" in page and "inflates the accuracy before" in page
        whole = json.loads(place.with_suffix(".json").read_text())
        assert len(whole["runs"]) == len(lines) and whole["claim"]
    assert "**Not finished: 2 of 18 attacks" in page and "RMU on mmlu" in page
