# SPDX-License-Identifier: Apache-2.0
"""Tasks with letters, settings of single tasks, and judges of generated text."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.configs import choices, muse
from jaxunlearn import evaluate, metrics
from jaxunlearn.data import table
from jaxunlearn.workflows.evaluation import config as evaluation
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import sources, tasks
from jaxunlearn.workflows.report import read
from tests.data.official_test import lines
from tests.workflows.invented_questions import SETTINGS, rows, score


def of_letters(count=5):
    found = rows("q", count, wrong=0, paraphrase=False)
    for i, row in enumerate(found):
        row |= {
            "choices": [f"Town {j}" for j in range(i, i + 4)],
            "answer": (i * i) % 4,
        }
    return found


def test_letters_by_hand():
    (row,) = sources.lettered(
        [{"question": "Who?", "choices": ["b", "a"], "answer": "a"}]
    )
    assert row["question"] == "Who?\nA. b\nB. a\nAnswer:"
    assert (row["answer"], row["choices"]) == ("B", ["A", "B"])
    for bad in ({"choices": ["a"], "answer": 1}, {"answer": "a"}):
        with pytest.raises(ValueError, match="choices with the answer among them"):
            sources.lettered([{"question": "Who?", **bad}])


def test_shots_of_letters_are_lettered(tmp_path):
    (tmp_path / "q.jsonl").write_text(lines(*of_letters(2)))
    task = {"source": "file", "path": str(tmp_path / "q.jsonl"), "letters": True}
    read_ = sources.read({"q": task | {"shots": task["path"]}})["q"]
    first, second = (row["question"] for row in read_.rows)
    shots = f"{first} A\n\n{second} B\n\n"
    wording = {"prompt": shots + "{question}", "end": ""}
    assert read_.score == sources.LETTER_SETTINGS | {"prompt_format": wording}


def test_a_task_of_letters_has_both_accuracies(made, tmp_path):
    model, params, tokenizer = made
    (tmp_path / "mmlu.jsonl").write_text(lines(*of_letters()))
    task = {"source": "file", "path": str(tmp_path / "mmlu.jsonl"), "letters": True}
    got = score(made, tmp_path / "eval", sources.read({"mmlu": task}))["tasks"]["mmlu"]
    assert "rougeL_recall" not in got  # a letter is chosen, nothing is generated
    facts = sources.lettered(of_letters())
    logps = np.stack(
        [
            evaluate.answer_logps(
                model,
                params,
                table.encode(tokenizer, [x["question"] for x in facts], [letter] * 5),
            )[0]
            for letter in "ABCD"
        ],
        axis=1,
    )
    right = [row["answer"] for row in of_letters()]
    for name, calibrated in (("accuracy", False), ("calibrated_accuracy", True)):
        hits = metrics.choice_accuracy(logps, np.array(right), calibrated=calibrated)
        assert_allclose(got[name]["value"], np.mean(hits))
        assert got[name]["n"] == 5
    wmdp = choices.get_config("wmdp").tasks
    assert wmdp.wmdp_cyber.table == "cyber" and wmdp.mmlu.letters


def test_judges_say_what_a_text_is(made, tmp_path):
    found = {"forget": rows("f", 3, wrong=0, paraphrase=False)}
    texts = []

    def length(given):
        texts.append(given)
        return [len(x) for x in given]

    judges = {"fluency": length}
    got = score(made, tmp_path, found, judges=judges)
    scored = folders.read_rows(tmp_path, "forget")
    assert texts == [[row["completion"] for row in scored]]
    assert [row["fluency"] for row in scored] == [len(x) for x in texts[0]]
    number = got["tasks"]["forget"]["fluency"]
    assert_allclose(number["value"], np.mean([len(x) for x in texts[0]]))
    assert number["low"] <= number["value"] <= number["high"]
    score(made, tmp_path, found, judges=judges)
    assert len(texts) == 1
    with pytest.raises(ValueError, match="'odd'"):
        score(made, tmp_path, found, judges={"odd": lambda texts: [1.0]})
    with pytest.raises(ValueError, match="'accuracy'"):
        score(made, tmp_path, found, judges={"accuracy": length})
    assert evaluation._judge("f", "statistics:mean")([1.0, 3.0]) == 2
    with pytest.raises(ValueError, match="'f' needs 'module:function', got 'nowhere:f"):
        evaluation._judge("f", "nowhere:f")


def test_prompts_of_muse_follow_answered_questions(made, tmp_path):
    place = tmp_path / "muse" / "books"
    for name, count in (("forget_qa", 2), ("retain_qa", 2)):
        (place / "knowmem").mkdir(parents=True, exist_ok=True)
        facts = [{"question": f"Q{i}?", "answer": "the city."} for i in range(count)]
        (place / "knowmem" / f"{name}.jsonl").write_text(lines(*facts))
        (place / "knowmem" / f"{name}_icl.jsonl").write_text(
            lines({"question": "S?", "answer": "T."})
        )
    (place / "verbmem").mkdir()
    (place / "verbmem" / "forget.jsonl").write_text(
        lines({"prompt": "The river", "gt": "flows to the sea."})
    )
    c = muse.get_config("books")
    for task in c.tasks.values():
        task.check = False
        task.score.new_tokens = 3
    c.tasks.forget_knowmem.score.stops = ("\n\n", "e")
    found = sources.read(c.tasks.to_dict(), str(tmp_path))
    got = score(
        made, tmp_path / "eval", found, settings=SETTINGS._replace(new_tokens=48)
    )
    scored = folders.read_rows(tmp_path / "eval", "forget_knowmem")
    assert scored[1]["prompt"] == "Question: S?\nAnswer: T.\n\nQuestion: Q1?\nAnswer:"
    assert not any("e" in row["completion"] for row in scored)
    row = folders.read_rows(tmp_path / "eval", "forget_verbmem")[0]
    assert (row["prompt"], row["answer"]) == ("The river", "flows to the sea.")
    rouge = metrics.rouge([row["completion"]], [row["answer"]])
    assert_allclose(row["rougeL_f1"], rouge["rougeL_f1"][0])
    assert got["tasks"]["retain_knowmem"]["rougeL_f1"]["n"] == 2
    about = json.loads((tmp_path / "eval" / "about.json").read_text())
    assert about["settings"]["tasks"]["forget_verbmem"]["new_tokens"] == 3


def test_settings_of_a_task_are_compared(made, tmp_path):
    plain = rows("f", 3, wrong=0, paraphrase=False)
    changed = {
        "forget": tasks.make(
            "forget", plain, score={"prompt_format": {"prompt": "Q: {question}"}}
        )
    }
    score(made, tmp_path / "changed", changed, role="retrained", name="changed")
    with pytest.raises(ValueError, match="prompt_format.prompt 'Q: {question}' there"):
        score(
            made, tmp_path / "common", {"forget": plain}, retrained=tmp_path / "changed"
        )
    score(made, tmp_path / "common", {"forget": plain}, name="common")
    score(
        made,
        tmp_path / "changed2",
        changed,
        name="changed2",
        retrained=tmp_path / "changed",
    )
    assert len(read.load([tmp_path / "changed", tmp_path / "changed2"])) == 2
    with pytest.raises(ValueError, match="differ in settings: tasks"):
        read.load([tmp_path / "changed", tmp_path / "common"])
    # An evaluation that was made before there were stops had none.
    for name in ("about", "cache"):
        file = tmp_path / "changed" / f"{name}.json"
        content = json.loads(file.read_text())
        for key in ("stops",):
            content.get("settings", {}).pop(key, None)
        file.write_text(json.dumps(content))
    assert len(read.load([tmp_path / "changed", tmp_path / "changed2"])) == 2
    again = {n: tasks.make(n, plain, score=x.score) for n, x in changed.items()}
    assert folders.read_reference(tmp_path / "changed", again, SETTINGS).rows
    with pytest.raises(ValueError, match="Did you mean 'prompt'"):
        tasks.make("forget", plain, score={"prompt_format": {"promt": ""}})
