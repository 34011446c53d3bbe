# SPDX-License-Identifier: Apache-2.0
"""What an evaluation refuses, warns of and counts; its command and its config."""

import json
import warnings

import pytest

from experiments.configs import evaluate as config_file
from jaxunlearn.io import hf
from jaxunlearn.workflows.evaluation import benchmarks, sources, tasks
from jaxunlearn.workflows.evaluation import config as evaluate
from jaxunlearn.workflows.evaluation import folder as folders
from tests import tiny
from tests.data.official_test import DATA, lines, there
from tests.workflows.invented_questions import SETTINGS, all_tasks, rows, score


def test_a_retrained_evaluation_of_other_data_is_refused(made, retrained, tmp_path):
    found = all_tasks(forget=rows("f", 6, start=1))
    message = (
        rf"{retrained.name}.*\(retrained\) has digest \w{{16}}\.\.\. for the task "
        r"'forget', and this evaluation has digest \w{16}"
    )
    with pytest.raises(ValueError, match=message):
        score(made, tmp_path, found, retrained=retrained)
    settings = SETTINGS.with_settings({"prompt_format": {"prompt": "Q: {question}"}})
    with pytest.raises(ValueError, match="prompt_format.prompt '{question}' there"):
        score(made, tmp_path, retrained=retrained, settings=settings)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        score(made, tmp_path, retrained=tmp_path / "nowhere")
    assert not (tmp_path / "rows").exists()


def test_rows_over_the_length_are_counted_reported_and_left_out(made, tmp_path):
    found = {"forget": rows("f")}
    found["forget"][2]["perturbed_answer"][1] = "the city of the river " * 12
    with pytest.warns(UserWarning, match="1 of 6 rows are longer than 64.*'f2' has"):
        got = score(made, tmp_path, found)
    left = got["tasks"]["forget"]["rows_left_out"]
    assert (left["value"], left["n"]) == (1, 6)
    ids = [row["id"] for row in folders.read_rows(tmp_path, "forget")]
    assert ids == ["f0", "f1", "f3", "f4", "f5"]
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["left_out"] == {"forget": ["f2"]}
    with pytest.warns(UserWarning, match="6 of 6 rows|no room for 60"):
        with pytest.raises(ValueError, match="no row is left"):
            settings = SETTINGS._replace(new_tokens=60)
            warnings.warn("6 of 6 rows", stacklevel=1)
            score(made, tmp_path, {"forget": rows("f")}, settings=settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": None}, "row 1: needs 'answer', but the row has"),
        ({"answer": 3}, "needs a text in 'answer', got 3"),
        ({"answer": " "}, "'forget', answer: .* at least one token, but row 1"),
        ({"paraphrased_answer": ""}, "paraphrased_answer: .* at least one token"),
        ({"perturbed_answer": "a"}, "needs a list of texts in 'perturbed_answer'"),
        ({"perturbed_answer": ["a"]}, "'perturbed_answer' in every row or in none"),
        ({"id": "f0"}, "rows 0 and 1 both have 'f0'"),
        ({"choices": ["x", "y"]}, "an answer that is one of its choices"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(made, tmp_path, change, message):
    found = rows("f", 3)
    found[1] |= change
    with pytest.raises(ValueError, match=message):
        score(made, tmp_path, {"forget": found})


def test_an_answer_without_tokens_is_refused(made, tmp_path):
    import tokenizers

    model, params, _ = made
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("zzz", "")
    found = rows("f", 3)
    found[2]["answer"] = "zzz"
    with pytest.raises(ValueError, match="'zzz' in row 2"):
        score((model, params, tokenizer), tmp_path, {"forget": found})


def test_rows_in_both_forget_and_retain_are_reported_by_id(made, tmp_path):
    found = all_tasks(retain=[*rows("r", 3), *rows("f", 2, start=4)])
    with pytest.warns(UserWarning, match="2 of the values of 'id' .*'f4', 'f5'"):
        score(made, tmp_path, found)
    bare = [{k: v for k, v in row.items() if k != "id"} for row in rows("f")]
    found = {name: tasks.make(name, bare) for name in ("forget", "retain")}
    with pytest.warns(UserWarning, match="6 of the values of 'question'"):
        assert len(tasks.overlap(found)) == 6


@pytest.mark.parametrize("name", ["bare", "bare.gguf"])
def test_a_model_without_a_tokenizer_is_refused_by_its_path(made, tmp_path, name):
    model, params, _ = made
    if name == "bare":
        hf.save(model, params, tmp_path / name)
    else:
        pytest.importorskip("gguf")
        hf.save_gguf(model, params, tmp_path / name, scheme="f32")
    (tmp_path / "forget.jsonl").write_text(lines(*rows("f")))
    c = evaluate.defaults()
    c |= dict(model=str(tmp_path / name), output=str(tmp_path / "eval"))
    c["tasks"] = dict(forget=dict(source="file", path=str(tmp_path / "forget.jsonl")))
    with pytest.raises(ValueError, match=f"{name} without .*tokenizer="):
        evaluate.evaluate(c)


def test_the_configs_tasks_read_tofu_and_errors_name_what_is_wrong(tmp_path):
    c = config_file.get_config("05")
    assert c.tasks.forget.table == "forget05_perturbed"
    with pytest.raises(FileNotFoundError, match="forget05_perturbed.json"):
        sources.read(c.tasks.to_dict(), str(tmp_path))
    for name, message in (
        ("tofuu", "'tofu'"),
        ("tofu:5", "'05'"),
        ("muse:new", "'news'"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmarks.tasks(name)
    for change, message in (
        ({"sorce": "file"}, "Did you mean 'source'"),
        ({"source": "file", "path": "x.jsonl", "columns": {"anser": "a"}}, "'answer'"),
        ({"source": "benchmark", "name": "tofuu"}, "Did you mean 'tofu'"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.read({"forget": change})


def test_columns_of_a_file_get_our_names(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(lines({"key": 7, "input": "Who?", "output": "Nobody."}))
    columns = {"id": "key", "question": "input", "answer": "output"}
    task = {"source": "file", "path": str(file), "columns": columns}
    (row,) = sources.read({"forget": task})["forget"].rows
    assert row == {"id": 7, "question": "Who?", "answer": "Nobody."}
    with pytest.raises((ValueError, KeyError), match="'reply'"):
        task["columns"] = {"question": "input", "answer": "reply"}
        sources.read({"forget": task})


@there("tofu", "forget05_perturbed.jsonl")
def test_tables_of_tofu_are_tasks():
    found = sources.read(config_file.get_config("05").tasks.to_dict(), str(DATA))
    sizes = {name: len(task.rows) for name, task in found.items()}
    assert sizes == {
        "forget": 200,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
        "holdout": 200,
    }
    assert found["world_facts"].kind == "options"


def test_prompts_and_running_text_are_questions_too(tmp_path):
    (tmp_path / "p.jsonl").write_text(lines({"prompt": "Who?", "answer": "No."}))
    (row,) = sources.read_file(tmp_path / "p.jsonl")
    assert (row["question"], row["answer"]) == ("Who?", "No.")
    (tmp_path / "t.jsonl").write_text(lines({"text": "a b c d e"}, {"text": "one"}))
    (row,) = sources.read_text_file(tmp_path / "t.jsonl")
    assert row == {"question": "a b", "answer": "c d e"}
    (tmp_path / "t.jsonl").write_text(lines({"text": "法国的首都是巴黎"}))
    (row,) = sources.read_text_file(tmp_path / "t.jsonl")
    assert row == {"question": "法国的首", "answer": "都是巴黎"}
    with pytest.raises(ValueError, match="'answer'"):
        sources.read_file(tmp_path / "t.jsonl")
