# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a tiny model: values, numbers, and the cache."""

import json
import math

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import evaluate, metrics, sharding, terms
from jaxunlearn.data import table
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import values
from tests import tiny
from tests.workflows.invented_questions import ALL, SETTINGS, all_tasks, rows, score


def numbers(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_folder_holds_what_is_promised(scored):
    about = json.loads((scored / "about.json").read_text())
    assert about["compute_dtype"] == "float32"  # of "auto"
    assert about["name"] == "eval" and about["role"] == "unlearned"
    assert (about["method"], about["seed"], about["command"]) == ("npo", 3, "here")
    assert set(about["data"]) == set(all_tasks()) and about["seconds"] > 0
    assert about["settings"]["new_tokens"] == 4 and about["versions"]["jax"]
    found = numbers(scored)
    assert set(found["tasks"]) == set(all_tasks())
    for task in (*found["tasks"].values(), found["overall"]):
        for name, number in task.items():
            assert set(number) == {"value", "low", "high", "n"}, name
            if number["low"] is not None:
                assert number["low"] <= number["high"], name
    forget = folders.read_rows(scored, "forget")
    assert [row["id"] for row in forget] == [f"f{i}" for i in range(6)]
    assert isinstance(forget[0]["completion"], str) and "mia_gradnorm" in forget[0]
    shown = (scored / "tokens" / "forget.jsonl").read_text().splitlines()
    first = json.loads(shown[0])
    assert first["id"] == "f0" and len(first["tokens"]) == len(first["logps"])
    assert "".join(first["tokens"]) == " the city of Town 0.</s>"
    mean = -np.mean(first["logps"])
    assert_allclose(mean, forget[0]["nll"], rtol=1e-5)
    assert not (scored / "tokens" / "retain.jsonl").exists()


def test_characters_of_several_tokens_are_shown_at_their_last_token():
    tokenizer, text = tiny.tiny_tokenizer(), "Zürich 東京 👨‍👩‍👧"
    found = values.token_texts(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text and "" in found and "東" in found


def test_values_are_those_of_the_library_one_by_one(made, scored):
    model, params, tokenizer = made
    for kind, found in (("forget", all_tasks()["forget"]), ("world_facts", None)):
        found = found or all_tasks()[kind]
        got = folders.read_rows(scored, kind)
        prompts = [row["question"] for row in found]
        ended = [row["answer"] + "</s>" for row in found]
        scores = evaluate.token_scores(
            model, params, table.encode(tokenizer, prompts, ended)
        )

        def close(name, expected, got=got):
            values = [row[name] for row in got]
            assert_allclose(values, expected, rtol=2e-5, atol=1e-6, err_msg=name)

        where = scores.where
        close("probability", metrics.probability(scores.logps, where=where))
        close("tokens", where.sum(1))
        hits = scores.hits
        close("extraction_strength", metrics.extraction_strength(hits, where=where))
        close("exact_memorization", metrics.exact_memorization(hits, where=where))
        if kind == "forget":
            close("mia_min_k", metrics.mia_min_k(scores.logps, where=where))
            plus = metrics.mia_min_k(scores.standardised, where=where)
            close("mia_min_k_plus_plus", plus)
        texts = evaluate.completions(
            model, params, tokenizer, prompts, max_new_tokens=4
        )
        answers = [row["answer"] for row in found]
        close("rougeL_recall", metrics.rouge(texts, answers)["rougeL_recall"])

    def nll(texts):
        logps, count = evaluate.answer_logps(
            model, params, table.encode(tokenizer, prompts, texts)
        )
        return -logps / count

    wrong = np.stack(
        [nll([r["perturbed_answer"][i] + "</s>" for r in found]) for i in range(3)], -1
    )
    close("truth_ratio", metrics.truth_ratio(nll(ended), wrong))
    close("normalised_probability", metrics.probability_with_options(nll(ended), wrong))


def test_numbers_are_those_of_tofu(scored, retrained):
    sets, got = {}, numbers(scored)
    for name in ("forget", "retain", "real_authors", "world_facts"):
        each = folders.read_rows(scored, name)
        nll = [row["nll"] for row in each]
        sets[name] = metrics.TofuRows(
            nll,
            [row["wrong_nll"] for row in each],
            [row.get("paraphrased_nll", row["nll"]) for row in each],
            [row["rougeL_recall"] for row in each],
        )
    expected = metrics.tofu_scores(sets)
    for name, each in expected.items():
        task = got["tasks"][name]
        many = name in ("real_authors", "world_facts")
        key = "normalised_probability" if many else "probability"
        assert_allclose(task[key]["value"], each["probability"], rtol=1e-6)
        assert_allclose(task["truth_score"]["value"], each["truth_ratio"], rtol=1e-6)
        assert_allclose(task["rougeL_recall"]["value"], each["rouge"], rtol=1e-9)
    overall = got["overall"]
    utility = metrics.model_utility(expected)
    assert_allclose(overall["model_utility"]["value"], utility, rtol=1e-6)
    ratios = [
        [row["truth_ratio"] for row in folders.read_rows(folder, "forget")]
        for folder in (scored, retrained)
    ]
    quality = metrics.forget_quality(*ratios)
    assert overall["forget_quality"]["value"] == quality.pvalue
    assert overall["forget_quality"]["low"] is None
    nll = [
        [np.asarray([r["nll"] for r in folders.read_rows(f, kind)], np.float32)]
        for f in (scored, retrained)
        for kind in ("forget", "holdout")
    ]
    differences = [np.asarray(nll[i][0] - nll[i + 2][0]) for i in (0, 1)]
    auc = metrics.auc(*differences)
    assert_allclose(overall["mia_reference_auc"]["value"], auc, atol=1e-9)
    attacks = [key for key in overall if key.startswith("mia_")]
    assert len(attacks) == 6 and overall["mia_loss_auc"]["n"] == 14
    other = numbers(retrained)["overall"]["mia_min_k_auc"]["value"]
    auc = overall["mia_min_k_auc"]["value"]
    assert_allclose(overall["privleak"]["value"], metrics.privleak(auc, other))


def test_the_retrained_model_compared_with_itself(made, other, retrained, tmp_path):
    found = score(made, tmp_path, params=other, retrained=retrained)["overall"]
    assert found["forget_quality"]["value"] == 1.0
    assert found["forget_quality_distance"]["value"] == 0.0
    assert found["mia_reference_auc"]["value"] == 0.5
    assert found["privleak"]["value"] == 0.0


def test_gradnorm_is_the_norm_of_each_row_by_itself(made):
    model, params, tokenizer = made
    two = rows("f", 2)
    encoded = table.encode(
        tokenizer, [r["question"] for r in two], [r["answer"] for r in two]
    )
    got = values.gradnorms(model, params, encoded, SETTINGS)
    for i in range(2):
        one = {name: x[i : i + 1] for name, x in encoded.items()}

        def loss(params, one=one):
            logps, where = terms.target_logps(model, params, one)
            return metrics.mean_nll(logps, where=where)[0]

        norm = metrics.mia_gradnorm(
            jax.jit(jax.grad(loss))(params), stacked=r"blocks/.*"
        )
        assert_allclose(got[i], norm, rtol=1e-4)


def test_compat_gives_the_numbers_of_openunlearning(made, tmp_path):
    settings = SETTINGS._replace(compat="openunlearning")
    score(made, tmp_path, settings=settings)
    found = folders.read_rows(tmp_path, "forget")
    least = [1 / (row["tokens"] - 1) for row in found]
    assert all(
        row["extraction_strength"] >= x - 1e-6
        for row, x in zip(found, least, strict=True)
    )
    with pytest.raises(ValueError, match="compat to be one of '', 'openunlearning'"):
        score(made, tmp_path, settings=SETTINGS._replace(compat="tofu"))


def forbid(monkeypatch):
    monkeypatch.setattr(
        values, "of_task", lambda *_, **__: pytest.fail("evaluated again")
    )


def test_a_repeated_evaluation_is_skipped_with_a_message(
    made, scored, retrained, monkeypatch
):
    forbid(monkeypatch)
    lines = []
    before = {x: x.stat().st_mtime_ns for x in scored.rglob("*") if x.is_file()}
    same = score(
        made,
        scored,
        retrained=retrained,
        method="npo",
        seed=3,
        command="there",
        settings=ALL,
        log_fn=lines.append,
    )
    assert len(lines) == 1 and str(scored) in lines[0]
    assert same == numbers(scored)
    after = {x: x.stat().st_mtime_ns for x in scored.rglob("*") if x.is_file()}
    assert before == after


def test_only_what_changed_is_done_again(made, other, tmp_path, monkeypatch):
    lines = []
    found = {name: all_tasks()[name] for name in ("forget", "retain")}
    score(made, tmp_path, found, log_fn=lines.append)
    assert [line.split(":")[0] for line in lines] == ["forget", "retain"]
    lines.clear()
    found["retain"] = found["retain"][1:]  # other data
    score(made, tmp_path, found, log_fn=lines.append)
    assert lines[0] == "forget: unchanged." and lines[1].startswith("retain: 6 rows")
    lines.clear()
    score(made, tmp_path, found, params=other, log_fn=lines.append)  # another model
    assert not any("unchanged" in line for line in lines) and len(lines) == 2
    lines.clear()
    file = tmp_path / "rows" / "forget.jsonl"  # a file that was tampered with
    file.write_text(file.read_text().replace("Town", "Tawn"))
    score(made, tmp_path, found, params=other, log_fn=lines.append)
    assert lines[0].startswith("forget: 6 rows") and lines[1] == "retain: unchanged."
    forbid(monkeypatch)
    lines.clear()
    again = score(made, tmp_path, {"retain": found["retain"]}, params=other)
    assert set(again["tasks"]) == {"retain"} and not file.exists()


def test_a_retrained_evaluation_added_later_repeats_no_task(
    made, retrained, tmp_path, monkeypatch
):
    assert "forget_quality" not in score(made, tmp_path)["overall"]
    forbid(monkeypatch)
    assert "forget_quality" in score(made, tmp_path, retrained=retrained)["overall"]


def test_an_evaluation_that_was_cut_off_keeps_its_finished_tasks(
    made, tmp_path, monkeypatch
):
    real = values.of_task

    def dies(model, params, tokenizer, task, *rest, **more):
        if task.name == "real_authors":
            raise KeyboardInterrupt
        return real(model, params, tokenizer, task, *rest, **more)

    monkeypatch.setattr(values, "of_task", dies)
    with pytest.raises(KeyboardInterrupt):
        score(made, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr(values, "of_task", real)
    lines = []
    score(made, tmp_path, log_fn=lines.append)
    assert lines[:2] == ["forget: unchanged.", "retain: unchanged."]
    assert len(lines) == 5 and set(numbers(tmp_path)["tasks"]) == set(all_tasks())


def test_a_model_that_is_not_finite_gets_no_number(made, tmp_path):
    broken = jax.tree.map(lambda x: x * math.nan, made[1])
    found = score(made, tmp_path, params=broken)
    for name in ("probability", "truth_score", "perplexity"):
        assert found["tasks"]["forget"][name]["value"] is None, name
    assert found["overall"]["model_utility"]["value"] is None
    assert found["overall"]["mia_loss_auc"]["value"] is None
    assert folders.read_rows(tmp_path, "forget")[0]["probability"] is None


def test_chat_prompts_use_the_tokenizers_template(made, retrained, tmp_path):
    model, params, _ = made
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ date_string }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    settings = SETTINGS.with_settings(
        {"new_tokens": 2, "prompt_format": {"chat": True, "end": "auto"}}
    ).with_settings(
        {"prompt_format": {"system": "Be.", "arguments": {"date_string": "5 May"}}}
    )
    found = {"forget": rows("f", 3, wrong=0, paraphrase=False)}
    for row in found["forget"]:
        row["question"] = "Land?"
    score((model, params, tokenizer), tmp_path, found, settings=settings)
    got = folders.read_rows(tmp_path, "forget")
    assert got[0]["prompt"] == "5 May[Be.][Land?]["
    text = "5 May[Be.][Land?][the city of Town 0.]"
    ids = tokenizer(text)["input_ids"]
    answer = np.arange(len(ids)) >= len(ids) - got[0]["tokens"]
    assert tokenizer.decode(np.asarray(ids)[answer]) == "the city of Town 0.]"
    alone = dict(tokens=[ids], mask=[[True] * len(ids)], answer=[answer])
    batch = {name: np.asarray(x) for name, x in alone.items()}
    logps, count = evaluate.answer_logps(model, params, batch)
    assert_allclose(got[0]["nll"], -logps[0] / count[0], rtol=1e-5)
    with pytest.raises(ValueError, match="chat template"):
        score(made, tmp_path / "bare", found, settings=settings)


def test_choices_give_an_accuracy(made, tmp_path):
    found = rows("m", 6, wrong=0, paraphrase=False)
    for i, row in enumerate(found):
        row["choices"] = [f"choice {j}" for j in range(4)]
        row["answer"] = i % 4  # by its number, as MMLU has it
    got = score(made, tmp_path, {"mmlu": found})["tasks"]["mmlu"]["accuracy"]
    model, params, tokenizer = made
    right = 0
    for row in found:
        encoded = table.encode(
            tokenizer, [row["question"]] * 4, [x + "</s>" for x in row["choices"]]
        )
        logps, lengths = evaluate.answer_logps(model, params, encoded)
        right += int((logps / lengths).argmax() == row["answer"])
    assert_allclose(got["value"], right / 6)


@pytest.mark.slow
def test_an_evaluation_on_a_mesh_gives_the_same(made, scored, retrained, tmp_path):
    model, params, tokenizer = made
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    shards = sharding.by_rules(params, mesh, model.rules)
    placed = (model, jax.device_put(params, shards), tokenizer)
    score(placed, tmp_path, retrained=retrained, mesh=mesh)
    for name in all_tasks():
        for one, other in zip(
            folders.read_rows(scored, name),
            folders.read_rows(tmp_path, name),
            strict=True,
        ):
            assert one.get("completion") == other.get("completion")
            assert_allclose(one["nll"], other["nll"], rtol=1e-4)
