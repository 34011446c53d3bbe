# SPDX-License-Identifier: Apache-2.0
"""RTT in a tiny decoder: how facts are chosen, what runs, what the page says."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments.rtt import figures, jobs, recovery, run
from experiments.rtt.smollm2 import facts as smollm2_facts
from experiments.rtt.smollm2 import page, score
from experiments.rtt.smollm2 import world as smollm2
from experiments.shared import ledger
from jaxunlearn import attacks, data
from jaxunlearn.data import capitals as facts
from jaxunlearn.data.benchmarks import rtt_facts
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
METHODS = ("incorrect", "rmu")
TRAINING = dict(steps=30, batch_size=8, learning_rate=1e-2)


def config(folder, **more):
    default = smollm2.SmolLM2Config()
    finetune = {name: {**each, **TRAINING} for name, each in default.finetune.items()}
    sizes = dict(length=64, num_facts=6, num_folds=3, num_retain=4, num_candidates=40)
    sizes |= dict(steps=1, batch_size=2, epochs=1, attack_batch_size=2)
    sizes |= dict(rates=dict.fromkeys(smollm2.METHODS, (1e-2, 1e-4)), rotations=1)
    sizes |= dict(max_rise=1e-3, attack_rate=1e-3, finetune=finetune)
    return default._replace(output=str(folder), **(sizes | more))


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
    """(model, params, tokenizer, questions); trained on some capitals and sums."""
    texts = [f"When was {row['name']} born?" for row in rtt_facts.birthdays(folds=1)]
    texts += [f"What is the capital of {fact.subject}?" for fact in facts.capitals()]
    tokenizer = tiny.tiny_tokenizer(texts, vocab=600)
    sizes = dict(width=32, layers=8, head_dim=8, positions=96)
    model, params = tiny.tiny_model(vocab=len(tokenizer), **sizes)
    rows = [{**row, "stem": row["question"]} for row in questions()]
    trained = [row for each in smollm2_facts.capitals() for row in each[:8]]
    settings = {**config("").finetune["birthdays"], "steps": 96}
    with jax.numpy_dtype_promotion("standard"):
        params = smollm2_facts.finetuned(
            model,
            params,
            tokenizer,
            [*trained, *rows[:16]],
            settings,
            64,
            tmp_path_factory.mktemp("trained") / "model",
        )
    return model, params, tokenizer, rows


@pytest.fixture(scope="module")
def few():
    """Two methods are enough: one that reads wrong answers, one with a reference."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = {name: smollm2.METHODS[name] for name in METHODS}
        patch.setattr(smollm2, "METHODS", chosen)
        yield


@pytest.fixture(scope="module")
def done(few, world, tmp_path_factory):
    """The experiment after its run."""
    folder = tmp_path_factory.mktemp("rtt")
    with jax.numpy_dtype_promotion("standard"):
        done = run.open_world(smollm2.SmolLM2(*world, config(folder)))
        done.run()
    return done


def attacked(lines):
    return [line for line in lines if line["kind"] == "rtt"]


def test_all_are_attacked_on_the_folds_of_the_seed(done):
    lines = attacked(done.book.lines)
    expected = {(of, who, 0) for of in smollm2.SETS for who in ("original", *METHODS)}
    expected |= {("birthdays", "never trained", fold) for fold in (0, 1, 2)}
    assert {(x["of"], x["who"], x["fold"]) for x in lines} == expected
    for line in lines:
        assert np.shape(line["hits"]) == (2, 2) and np.shape(line["losses"]) == (1,)
    more = config("", seeds=(4, 7), num_folds=5, rotations=2)
    assert smollm2.rotations(more, 4) == [0, 1]
    assert smollm2.rotations(more, 7) == [2, 3]


def test_the_largest_rate_within_the_bound_is_attacked(done):
    lines = done.book.lines
    base = {x["of"]: x for x in lines if x["kind"] == "facts"}
    for of in smollm2.SETS:
        for who in METHODS:
            runs = [
                x
                for x in lines
                if (x["kind"], x["of"], x.get("method")) == ("unlearned", of, who)
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


def test_birthdays_are_known_after_finetuning(done, world):
    book = done.book
    assert book["facts birthdays"]["choice"] == 1
    assert list(done.world.output.glob("finetuned-*/config.json"))
    first = [x for x in attacked(book.lines) if x["who"] == "never trained"]
    assert len(first) == 3  # the pretrained model is scored on every fold
    hits = np.concatenate([x["hits"][0] for x in first])
    model, params, tokenizer, _ = world
    forget, _ = smollm2_facts.birthdays(done.world.config)
    prompt_format = data.PromptFormat(prompt=smollm2_facts.PROMPT)
    columns = attacks.encode_questions(
        model, tokenizer, forget, "choice", prompt_format=prompt_format
    )
    assert hits.mean() == smollm2_facts.known(model, params, columns)["choice"]


def test_facts_of_pretraining_have_the_largest_margins(done, world):
    model, params, tokenizer, rows = world
    right, about = smollm2_facts.choose(model, params, tokenizer, rows)
    assert about == {"candidates": 60, "correct": len(right)} and 16 <= len(right) < 50
    columns = attacks.encode_questions(model, tokenizer, right, "choice")
    logps = jobs.option_logps(model, params, columns, batch_size=10)
    assert_array_equal(logps.argmax(1), columns["right"])
    margins = logps.max(1) - np.sort(logps, 1)[:, -2]
    assert (np.diff(margins) <= 1e-6).all()
    line = done.book["facts mmlu"]
    assert line["candidates"] == 40 and 12 <= line["correct"] and line["facts"] == 6


def test_questions_of_mmlu_need_no_context_and_are_short(world):
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
    (only,) = smollm2_facts.short([*poor, good], tokenizer, 48)
    assert only["question"] == good["question"] and only["answer"] == good["answer"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(rotations=4), "rotations=4"),
        (dict(num_facts=3), "'capitals'.*got 3"),
    ],
)
def test_what_cannot_be_run_is_refused(done, few, world, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run.open_world(smollm2.SmolLM2(*world, config(tmp_path, **more))).run()
    with pytest.raises(ValueError, match="rates"):
        smollm2.check(config(tmp_path, rates={"rmu": (1e-4,)}))


def made(early, late, *, choice=0.3, facts=40):
    """Lines of one method on two kinds: so many right of `facts` after the attack."""
    lines = []
    for of, right in (("capitals", early), ("birthdays", late)):
        shared = dict(of=of, seed=0, choice=choice, retain_loss=1.0, prose_loss=3.0)
        shared |= dict(retain_choice=1.0)
        lines.append(
            shared
            | dict(key=f"facts {of}", kind="facts", choice=1.0, probability=0.5)
            | dict(facts=facts, num_retain=5)
            | (dict(candidates=80, correct=60) if of == "capitals" else {})
        )
        lines.append(
            shared
            | dict(key="u", kind="unlearned", method="npo", rate=1e-4)
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
    rows = score.summarise(made(30, 20))
    row = next(x for x in rows if (x["of"], x["who"]) == ("capitals", "npo"))
    assert row["forgot"] and row["facts"] == 40
    assert row["recovery"][0] == 0.75
    assert_allclose([row["above"][0], row["returned"][0]], 0.5 / 0.75)
    assert row["above"][1] < 0.6 < 0.7 < row["above"][2]
    assert_allclose(row["retain_rise"], 0.05)


@pytest.mark.parametrize(
    ("early", "late", "words"),
    [
        (38, 14, ("holds", "holds", "the claim holds in both parts here")),
        (38, 38, ("holds", "fails", "facts finetuned in: fails")),
        (
            14,
            12,
            (
                "fails",
                "undecided",
                "the claim fails here (most comes back of capitals: fails",
            ),
        ),
        (24, 18, ("undecided", "undecided", "the claim is undecided here")),
    ],
)
def test_the_claim_is_read_off_the_numbers(early, late, words):
    lines = made(early, late)
    found = score.claim(lines, score.summarise(lines))
    assert (found["most_returns"]["capitals"], found["much_less"]) == words[:2]
    assert words[2] in page._claim(found)


def test_what_was_not_removed_cannot_come_back():
    lines = made(38, 38, choice=0.9)
    for line in lines:
        if line["kind"] == "rtt":
            line["hits"][0] = line["hits"][1]
    lines[3]["hits"][0] = [1] * 40  # the methods answer all, before as after
    lines[2]["hits"][1] = lines[3]["hits"][1]
    rows = score.summarise(lines)
    found = score.claim(lines, rows)
    assert "capitals" not in found["returned"] and "much_less" not in found
    text = "\n".join(page._answers(found, rows))
    assert "pretraining): nothing above chance was removed" in text
    assert page._claim(found) == "not measured in both parts."


def test_below_chance_counts_as_chance():
    means = np.array([0.5, 0.25, 0.0, 0.25, 1.0])  # two methods after, before; original
    assert_allclose(recovery.returned(means), 0.25 / 1.5)


def test_the_page_of_a_stopped_run_says_so(done, tmp_path):
    about = ledger.plain(done.world.config._asdict())
    about |= {"command": "this", "versions": {"jax": "1"}, "device": "cpu"}
    about["rates"]["npo"] = [1e-4]
    for lines in (done.book.lines, made(38, 14)):
        figures.write("smollm2", lines, about, tmp_path)
        assert (tmp_path / "results" / "smollm2.png").stat().st_size > 5000
        text = (tmp_path / "README.md").read_text()
        assert "inflates the accuracy before" in text
    assert "**Not finished: 2 of 9 attacks" in text and "RMU on mmlu" in text
