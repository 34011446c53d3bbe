# SPDX-License-Identifier: Apache-2.0
"""The small world, made tiny: cached, resumed, with a model that lacks the facts."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.small import biographies, questions, score, world
from experiments.small.configs import tofu as tofu_config
from jaxunlearn import evaluate
from tests.experiments import conftest

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_the_model_knows_every_author_and_the_retrained_model_only_those_to_retain(
    small_world,
):
    _, small = small_world
    for kind in ("forget", "retain"):
        for params, knows in (
            (small.params, True),
            (small.retrained, kind == "retain"),
        ):
            logps, lengths = evaluate.answer_logps(
                small.model, params, small.table(kind)
            )
            nll = -logps.sum() / lengths.sum()
            assert (nll < 0.1) if knows else (nll > 0.5), (kind, knows, nll)


def test_a_world_that_is_there_is_read_and_not_made_again(small_world, monkeypatch):
    folder, small = small_world
    monkeypatch.setattr(world, "_make", lambda *_: pytest.fail("made again"))
    again = world.make(conftest.tiny_world(folder))
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert again.digest == small.digest
    assert list(again.questions["forget"]) == list(small.questions["forget"])
    assert not list(folder.glob("*.making"))


def test_another_config_is_another_world_but_another_place_is_not(small_world):
    folder, small = small_world
    rows = small.questions
    plain = json.loads(json.dumps(conftest.tiny_world(folder).to_dict()))
    assert world.digest(plain, rows) == small.digest
    assert world.digest(plain | {"output": "there"}, rows) == small.digest
    assert world.digest(plain | {"learning_rate": 1.0}, rows) != small.digest
    assert world.digest(plain, {**rows, "forget": rows["forget"][1:]}) != small.digest


def test_a_training_that_was_cut_off_goes_on_to_the_same_params(
    small_world, tmp_path, monkeypatch
):
    _, small = small_world
    fit, calls = world.ju.fit, []

    def dies(step, state, stream, frozen, *, steps, hooks, progress):
        calls.append(int(state.step))
        if len(calls) == 1:

            def last(state, entry):
                if entry["step"] == 70:
                    raise KeyboardInterrupt

            hooks = [*hooks, last]
        return fit(
            step, state, stream, frozen, steps=steps, hooks=hooks, progress=progress
        )

    monkeypatch.setattr(world.ju, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        world.make(conftest.tiny_world(tmp_path))
    assert not (tmp_path / small.digest).exists()
    again = world.make(conftest.tiny_world(tmp_path))
    assert calls == [0, 50, 0]  # from the checkpoint; then the retrained model
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)


def test_scores_of_the_original_and_of_the_retrained_model(small_world):
    _, small = small_world
    judge = score.scorer(small)
    full, retrained = (score.summary(judge, p) for p in (small.params, small.retrained))
    assert full["forget_exact"] > 0.8 > 0.3 > retrained["forget_exact"]
    assert min(full["retain_exact"], retrained["retain_exact"]) > 0.8
    assert retrained["forget_quality"] == 1.0 and retrained["distance"] == 0.0
    assert full["distance"] > 0 and full["forget_nll"] < retrained["forget_nll"]
    # Against the library's own scoring, one row at a time.
    rows = score.per_row(judge, small.retrained)["forget"]
    logps, lengths = evaluate.answer_logps(
        small.model, small.retrained, small.table("forget")
    )
    assert_allclose(rows["probability"], np.exp(logps / lengths), rtol=1e-4)


def test_exact_is_what_greedy_decoding_gives(small_world):
    _, small = small_world
    rows = small.questions["forget"]
    judge = score.scorer(small)
    for params in (small.params, small.retrained):
        texts = evaluate.completions(
            small.model,
            params,
            small.tokenizer,
            [row["question"] for row in rows],
            max_new_tokens=24,
        )
        same = [t.strip() == r["answer"] for t, r in zip(texts, rows, strict=True)]
        assert same == score.per_row(judge, params)["forget"]["exact"].tolist()


def test_made_up_authors_are_distinct_and_their_wrong_answers_wrong():
    rows = biographies.rows(forget=5, retain=40, seed=3)
    assert rows == biographies.rows(forget=5, retain=40, seed=3)
    assert rows != biographies.rows(forget=5, retain=40, seed=4)
    names = {kind: {row["author"] for row in each} for kind, each in rows.items()}
    assert len(names["forget"]) == 5 and len(names["retain"]) == 40
    assert not names["forget"] & names["retain"]
    for row in rows["forget"] + rows["retain"]:
        options = [row["paraphrased_answer"], *row["perturbed_answer"]]
        assert len(set(options)) == 6
        assert all(row["author"] in text for text in (row["question"], *options))


def test_the_tofu_world_reads_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXUNLEARN_DATA", str(tmp_path))
    facts = tofu_config.get_config().facts.to_dict()
    with pytest.raises(FileNotFoundError, match="biographies.py"):
        questions.read(facts, 400)
    made_up = biographies.rows(forget=20, retain=25)
    forget, retain = made_up["forget"], made_up["retain"]
    (tmp_path / "tofu").mkdir()
    bare = [{k: r[k] for k in ("question", "answer")} for r in retain + forget]
    long = dict(forget[0], answer="word " * 60)
    for name, rows in (
        ("forget10_perturbed", [*forget, long]),
        ("retain_perturbed", retain[:80]),
        ("full", [*bare, long]),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "tofu" / f"{name}.jsonl").write_text(text)
    found, tokenizer = questions.read(facts | {"num_extra": 50}, 600)
    assert [r["question"] for r in found["forget"]] == [r["question"] for r in forget]
    texts = [row["question"] for row in found["retain"]]
    assert texts == [row["question"] for row in retain[:130]]
    assert tokenizer.decode(tokenizer("Lisbon")["input_ids"]) == "Lisbon"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(facts={}), "facts.source"),
        (dict(facts=dict(source="novel")), "one of"),
        (dict(stpes=3), "stpes"),
        (dict(steps=0), "steps"),
        (dict(warmup=500), "warmup"),
        (dict(model=dict(width=30, layers=1, heads=4, hidden=8)), "heads"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path, change, message):
    c = conftest.tiny_world(tmp_path).to_dict()
    with pytest.raises(ValueError, match=message):
        world.make(world.ConfigDict(c | change))


def test_a_broken_model_has_no_utility(small_world):
    _, small = small_world
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), small.params)
    found = score.summary(score.scorer(small), broken)
    assert found["utility"] == found["retain_probability"] == 0.0
    assert all(np.isfinite(list(found.values())))
