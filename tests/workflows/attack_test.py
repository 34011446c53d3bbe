# SPDX-License-Identifier: Apache-2.0
"""Every attack on a tiny folder: the card, resuming, and what is refused.

Over 400 lines because all of it shares one attacked folder.
"""

import copy
import json
import math
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.configs import attack as config_file
from jaxunlearn.io import hf
from jaxunlearn.workflows.attack import card, facts, jobs, prompts
from jaxunlearn.workflows.attack import config as attack
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
ATTACKS = {
    "quantize": dict(kinds=("int4",), group=8),
    "prefix": {},
    "few_shot": dict(num_shots=2),
    "sample": dict(num_samples=4),
    "steer": dict(strengths=(1.0,)),
    "prune": dict(fractions=(0.1,)),
    "unwrap": {},
    "benign": dict(steps=2, batch_size=2, length=16),
    "relearn": dict(steps=2, batch_size=4),
    "rtt": dict(
        folds=3, rotations=1, learning_rates=(1e-4, 1e-3), epochs=2, warmup_steps=1
    ),
}
NAMES = ["quantize int4", "prefix", "few_shot", "sample", "steer 1", "prune 0.1"]
NAMES += ["benign", "relearn", "rtt 0"]


def rows(kind, count):
    towns = [f"Town {i}" for i in range(count)]
    return [
        {
            "id": f"{kind}{i}",
            "question": f"The capital of Land {kind}{i} is",
            "answer": f"{towns[i]}.",
            "choices": [f"{towns[(i + j) % count]}." for j in range(3)],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models and two files of facts."""
    folder = tmp_path_factory.mktemp("attack")
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=96)
    hf.save(model, params, folder / "original", tokenizer=tokenizer)
    other = jax.tree.map(lambda x: x * 1.1, params)
    hf.save(model, other, folder / "model", tokenizer=tokenizer)
    for kind, count in (("forget", 7), ("retain", 5)):
        lines = [json.dumps(row) + "\n" for row in rows(kind[0], count)]
        (folder / f"{kind}.jsonl").write_text("".join(lines))
    return folder


def config(place, output, **more):
    file = dict(source="file", path="")
    return {
        "facts": {
            kind: file | dict(path=str(place / f"{kind}.jsonl"))
            for kind in ("forget", "retain")
        },
        "model": str(place / "model"),
        "output": str(output),
        "query": dict(new_tokens=3, batch_size=8),
        "attacks": {name: dict(settings) for name, settings in ATTACKS.items()},
        **more,
    }


@pytest.fixture(scope="module")
def done(place, tmp_path_factory, standard_promotion):
    output = tmp_path_factory.mktemp("card")
    c = config(place, output, original=str(place / "original"))
    return output, c, *attack.attack(c, command="the command")


@pytest.mark.slow
def test_every_attack_runs_and_is_on_the_card(done):
    output, _, numbers, text = done
    files = {x.stem for x in (output / "attacks").glob("*.json")}
    names = {n.replace(" ", "_") for n in [*NAMES, "unlearned", "original"]}
    more = {"original_rtt_0", "original_sample"}
    assert files == names | more
    shown = [row["name"] for row in numbers["rows"]]
    queried = [n for n in NAMES if n != "sample" and not n.startswith("rtt")]
    assert shown == ["original", "unlearned", *queried]
    assert list(numbers["not_run"]) == ["unwrap"]
    assert "unwrap" in numbers["not_run"]["unwrap"]
    assert (output / "card.md").read_text() == text and "`the command`" in text
    for name in ("**original**", "**unlearned**", "few_shot", "k samples", "RTT"):
        assert name in text
    saved = json.loads((output / "card.json").read_text())
    assert saved["about"]["facts"] == {"forget": 7, "retain": 5}
    assert saved["about"]["versions"]["jax"] and saved["rtt"]["num_facts"] == 3


@pytest.mark.slow
def test_numbers_are_means_of_what_the_files_hold(done):
    output, _, numbers, _ = done
    for row in numbers["rows"]:
        name = row["name"].replace(" ", "_")
        result = json.loads((output / "attacks" / f"{name}.json").read_text())["result"]
        for kind in ("forget", "retain"):
            for way in prompts.MEASURES:
                assert_allclose(row[kind][way], np.mean(result[kind][way]))
    relearn = next(row for row in numbers["rows"] if row["name"] == "relearn")
    assert relearn["num_facts"] == 3  # of seven, the others were trained on
    for way, best in numbers["strongest"].items():
        gains = {
            r["name"]: r["forget"][way] - r["before"][way] for r in numbers["rows"][2:]
        }
        assert gains[best["attack"]] == max(gains.values())
    rtt = numbers["rtt"]
    assert_allclose(rtt["rate"], rtt["unlearned"] / rtt["original"])
    assert_allclose(rtt["chance"], 1 / 3)
    leak = numbers["leak"]
    assert set(leak) == {"original sample", "sample"} and set(leak["sample"]) == set(
        "14"
    )


def count_runs(monkeypatch, stop=None, error=KeyboardInterrupt):
    """Counts units that run; the one called `stop` is cut off."""
    ran = []

    def plan(*args, plan=jobs.plan, **more):
        def counted(unit):
            def run(scene):
                ran.append(unit.name)
                if unit.name == stop:
                    raise error
                return unit.run(scene)

            return unit._replace(run=run)

        return [counted(unit) for unit in plan(*args, **more)]

    monkeypatch.setattr(jobs, "plan", plan)
    return ran


@pytest.mark.slow
def test_an_interrupted_attack_resumes(place, done, tmp_path, monkeypatch):
    c = config(place, tmp_path, only="prefix,few_shot,prune")
    with monkeypatch.context() as patch:
        count_runs(patch, stop="few_shot")
        with pytest.raises(KeyboardInterrupt):
            attack.attack(c)
    before = {x.stem: x.stat().st_mtime_ns for x in (tmp_path / "attacks").iterdir()}
    assert set(before) == {"unlearned", "prefix"}
    assert not (tmp_path / "card.md").exists()
    ran = count_runs(monkeypatch)
    numbers, _ = attack.attack(c)
    assert ran == ["few_shot", "prune 0.1"]
    for name, when in before.items():
        assert (tmp_path / "attacks" / f"{name}.json").stat().st_mtime_ns == when
    rows_of_done = {row["name"]: row for row in done[2]["rows"]}
    assert all(row == rows_of_done[row["name"]] for row in numbers["rows"])


def test_few_shot_takes_as_many_shots_as_the_positions_hold(place, monkeypatch):
    fact_set = facts.FactSet(
        *([fact | {"text": fact["answer"]} for fact in rows(k, 5)] for k in "fr")
    )
    monkeypatch.setattr(jobs.Context, "query", lambda self, change: {"change": change})
    (job,) = jobs.plan({"few_shot": {}}, has_original=False)[1:]
    for max_length, num_shots in ((1000, 4), (60, 2), (10, 1), (None, 4)):
        model = SimpleNamespace(config=SimpleNamespace(max_length=max_length))
        settings = prompts.PromptSettings(new_tokens=3)
        found = job.run(
            jobs.Context(model, {}, tiny.tiny_tokenizer(), fact_set, settings)
        )
        assert all(x.count("\n") == num_shots for x in found["change"](["Land"]))
        assert ("note" in found) == (num_shots < 4)
    values = {way: [0.0] * 5 for way in prompts.MEASURES}
    result = {"forget": values, "retain": values}
    noted = {"unlearned": result, "few_shot": result | {"note": "2 of 4 shots"}}
    assert card.make(noted, range(5), {})["rows"][1]["note"] == "2 of 4 shots"


@pytest.mark.slow
def test_only_what_changed_runs_again(done, monkeypatch):
    _, c, numbers, _ = done
    ran = count_runs(monkeypatch)
    again, _ = attack.attack(c)
    assert ran == ["unwrap"] and again == numbers  # what could not run is tried again
    ran.clear()
    c = copy.deepcopy(c) | {"only": "few_shot,prefix"}
    c["attacks"]["few_shot"]["num_shots"] = 1
    attack.attack(c)
    assert ran == ["few_shot"]
    ran.clear()
    c["model"] = c["original"]  # the results of another model
    c["only"] = "prefix"
    attack.attack(c)
    assert ran == ["unlearned", "prefix"]


@pytest.mark.slow
def test_known_facts_are_those_the_original_gets_right(done, place, tmp_path):
    c = config(place, tmp_path, original=str(place / "original"), only="prefix")
    c["known"] = "choice"
    original = json.loads((done[0] / "attacks" / "original.json").read_text())["result"]
    right = {kind: int(sum(original[kind]["choice"])) for kind in ("forget", "retain")}
    if min(right.values()) < 2:
        with pytest.raises(ValueError, match="two or more facts .* by choice"):
            attack.attack(c)
        return
    numbers, _ = attack.attack(c)
    first = numbers["rows"][0]
    assert first["num_facts"] == right["forget"] and first["forget"]["choice"] == 1.0


def test_known_facts_need_the_originals_answers(place, tmp_path, monkeypatch):
    original, cannot = str(place / "original"), ValueError("No answers.")
    c = config(place, tmp_path, original=original, only="prefix", known="choice")
    ran = count_runs(monkeypatch, stop="original", error=cannot)
    with pytest.raises(ValueError, match="known='choice'.* No ans"):
        attack.attack(c)
    assert ran == ["original"]
    c["known"] = ""
    numbers, _ = attack.attack(c)
    assert numbers["not_run"] == {"original": "No answers."}


def test_one_model_is_in_memory_at_a_time(place, tmp_path, monkeypatch):
    loaded = []

    def load(*args, load=hf.load, **more):
        assert all(leaf() is None for leaves in loaded for leaf in leaves)
        found = load(*args, **more)
        loaded.append([weakref.ref(leaf) for leaf in jax.tree.leaves(found[1])])
        return found

    monkeypatch.setattr(hf, "load", load)
    c = config(place, tmp_path, original=str(place / "original"), only="prefix")
    attack.attack(c)
    assert len(loaded) == 2 and loaded[0]


def test_a_model_without_a_tokenizer_is_refused_by_its_path(place, tmp_path):
    model, params, _ = hf.load(place / "model")
    hf.save(model, params, tmp_path / "bare")
    c = config(place, tmp_path / "card", model=str(tmp_path / "bare"), only="prefix")
    with pytest.raises(ValueError, match="bare without .*tokenizer="):
        attack.attack(c)


def test_an_attack_that_diverges_is_reported_and_others_run(place, tmp_path):
    c = config(place, tmp_path, only="benign,prefix")
    c["attacks"]["benign"]["learning_rates"] = (1e30,)
    numbers, text = attack.attack(c)
    assert list(numbers["not_run"]) == ["benign"]
    assert "- benign: " in text.split("Not run:")[1]
    assert [row["name"] for row in numbers["rows"]] == ["unlearned", "prefix"]


def test_numbers_that_are_not_finite_are_shown_as_none(place, tmp_path, monkeypatch):
    c = config(place, tmp_path, only="benign,prefix")
    c["attacks"]["benign"] |= dict(learning_rates=(1e30,), steps=1)
    ran = count_runs(monkeypatch)
    first, text = attack.attack(c)
    again, _ = attack.attack(c)
    assert ran == ["unlearned", "prefix", "benign"]
    for numbers in (first, again):
        _, prefix, benign = numbers["rows"]
        assert math.isnan(benign["forget"]["probability"])
        assert not math.isnan(prefix["forget"]["probability"])
        for way in prompts.MEASURES:
            assert numbers["strongest"][way]["attack"] == "prefix"
    (line,) = (line for line in text.split("\n") if line.startswith("| benign"))
    assert line.count("–") == 2 and "nan" not in text
    assert "not finite (benign)" in text


def test_without_an_original_there_is_no_rate(place, tmp_path):
    numbers, text = attack.attack(config(place, tmp_path, only="rtt"))
    assert "rate" not in numbers["rtt"] and 0 <= numbers["rtt"]["unlearned"] <= 1
    assert "recovery" not in text


def test_an_attack_that_cannot_run_is_reported_and_others_run(place, tmp_path):
    c = config(place, tmp_path, only="rtt,quantize,prefix")
    c["attacks"]["rtt"]["folds"] = 8
    c["attacks"]["quantize"]["group"] = 7
    numbers, text = attack.attack(c)
    assert set(numbers["not_run"]) == {"rtt 0", "quantize int4"}
    assert "=8 and 7 values" in text and "group=7" in text
    assert [row["name"] for row in numbers["rows"]] == ["unlearned", "prefix"]


def test_a_fact_in_two_folds_is_named(place, tmp_path):
    twice = rows("f", 6)
    twice[5]["question"] = twice[0]["question"].upper()
    lines = [json.dumps(row) + "\n" for row in twice]
    (tmp_path / "forget.jsonl").write_text("".join(lines))
    (tmp_path / "retain.jsonl").write_text((place / "retain.jsonl").read_text())
    c = config(place, tmp_path / "card", only="rtt")
    for kind in ("forget", "retain"):
        c["facts"][kind]["path"] = str(tmp_path / f"{kind}.jsonl")
    c["facts"]["forget"]["block"] = 2
    numbers, _ = attack.attack(c)
    assert "land f0 is'" in numbers["not_run"]["rtt 0"].lower()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(model=""), "model"),
        (dict(known="choice"), "known='choice'"),
        (dict(known="no"), "known='no'"),
        (dict(only="rtx"), "'rtt'"),
        (dict(attacks={"rtt": dict(rate=1)}), "setting='rate'"),
        (dict(attacks={"rtt": dict(rotations=9)}), "rotations=9"),
        (dict(attacks={"rtt": dict(optimizer="sgd")}), "optimizer='sgd'"),
        (dict(attacks={"shout": {}}), "attack='shout'"),
        (dict(extra=1), "key='extra'"),
        (dict(facts={"forget": {}}), "'retain'"),
    ],
)
def test_bad_configs(place, tmp_path, change, match):
    c = config(place, tmp_path)
    c |= change
    with pytest.raises((ValueError, KeyError), match=match):
        attack.attack(c)


def test_rows_become_facts():
    given = [
        {"id": 1, "question": "q", "answer": "x", "choices": ["y", "x"]},
        {"id": 2, "question": "r", "answer": "a", "perturbed_answer": list("bcde")},
    ]
    made = facts.from_rows(given, block=2)
    assert made[0]["choices"] == ["y", "x"] and made[0]["answer"] == 1
    assert sorted(made[1]["choices"]) == list("abcd")
    assert made[1]["choices"][made[1]["answer"]] == "a"
    assert made[0]["subject"] == made[1]["subject"] == 0
    for bad in ({"choices": ["x"]}, {"perturbed_answer": ["x", "z"]}, {}):
        with pytest.raises(ValueError, match="two or more different choices"):
            facts.from_rows([{"id": 1, "question": "q", "answer": "x"} | bad])


def test_capitals_come_with_choices_of_their_continent():
    found = facts.read(config_file.get_config().facts.to_dict())
    assert len(found.forget) > 30 and len(found.retain) == 60
    france = next(f for f in found.forget if f["text"] == "Paris")
    assert "France" in france["question"] and len(france["choices"]) == 4
    pool = {f["text"] for f in found.forget}
    assert all(set(f["choices"]) <= pool for f in found.forget)


def test_an_answer_is_found_as_whole_words():
    fact = {"text": "Rome."}
    for text, yes in (("It is ROME, in Italy", True), ("Romeo", False), ("", False)):
        assert prompts.contains_answer(text, fact) is yes
    assert prompts.contains_answer("法国的首都是巴黎。", {"text": "巴黎"})
    assert not prompts.contains_answer("हिन्दी", {"text": "हिन्द"})


def test_the_strongest_attack_by_hand():
    def result(*values):
        ways = {way: list(values) for way in prompts.MEASURES}
        return {"forget": ways, "retain": ways}

    found = {
        "unlearned": result(0.0, 0.4),
        "prefix": result(0.2, 0.4),
        "relearn": result(0.5) | {"held_out": ["b"]},
    }
    nan = result(0.9, 0.9)
    nan["forget"]["probability"] = [0.9, math.nan]
    found = {"unlearned": found.pop("unlearned"), "benign": nan} | found
    numbers = card.make(found, ["a", "b"], {})
    strongest = numbers["strongest"]["choice"]
    assert strongest["attack"] == "prefix"
    assert_allclose([strongest["before"], strongest["after"]], [0.2, 0.3])
    assert_allclose(numbers["rows"][3]["before"]["choice"], 0.4)


def test_a_result_that_no_attack_changes_is_not_called_a_rise():
    def sentences(after, **rtt):
        measures = {way: {"attack": "prefix"} for way in prompts.MEASURES}
        for way in measures:
            measures[way] |= {"before": 0.25, "after": after}
        rtt |= {"before": 0.25, "original": 1.0, "rate": 0.25, "floor": 0.25}
        return card._sentences({"strongest": measures, "rtt": rtt})

    for after in (0.2, 0.25, 0.2501):
        *attacks, retraining = sentences(after, unlearned=0.2501)
        assert all("no attack raises it above 0.25" in line for line in attacks)
        assert "leaves choice on held-out facts at 0.25." in retraining
    *attacks, retraining = sentences(0.3, unlearned=0.5)
    assert all("from 0.25 before it to 0.30 after it" in line for line in attacks)
    assert "raises choice on held-out facts from 0.25 to 0.50." in retraining


def test_rows_of_a_file_are_facts_with_wordings_and_drawn_choices(tmp_path):
    def file(name, given):
        text = "".join(json.dumps(row) + "\n" for row in given)
        (tmp_path / name).write_text(text)
        return facts.RowFile(tmp_path / name)

    given = [
        {"prompt": f"Land {i} is", "answer": f"Town {i}.", "wordings": [f"L{i}:"]}
        for i in range(6)
    ]
    retain = [{"prompt": f"Sea {i} is", "answer": "ab"[i % 2]} for i in range(9)]
    found = facts.read_files(file("f.jsonl", given), file("r.jsonl", retain))
    assert [fact["question"] for fact in found.forget[:2]] == ["Land 0 is", "L0:"]
    assert found.forget[0]["subject"] == found.forget[1]["subject"]
    for fact in found.forget:
        assert len(set(fact["choices"])) == 4
        assert fact["choices"][fact["answer"]] == fact["text"]
    assert {len(fact["choices"]) for fact in found.retain} == {2}
    few = facts.read_files(
        *map(facts.RowFile, (tmp_path / "f.jsonl", tmp_path / "r.jsonl")), max_rows=3
    )
    assert len(few.forget) == 6 and len(few.retain) == 3
    with pytest.raises(ValueError, match="wordings.*'x'"):
        bad = file("bad.jsonl", [given[0] | {"wordings": "x"}])
        facts.read_files(bad, facts.RowFile(tmp_path / "r.jsonl"))
