# SPDX-License-Identifier: Apache-2.0
"""The small world's evaluation: original, retrained and unlearned, and their report."""

import json

import pytest

from experiments.comparison import evaluate
from experiments.small import unlearn
from jaxunlearn.workflows import records
from jaxunlearn.workflows.report import read
from jaxunlearn.workflows.report import run as report
from tests.data.official_test import DATA, there

pytestmark = pytest.mark.usefixtures("standard_promotion")
RATES = {"blur.npo": 2e-3}
STEPS = 3


@pytest.fixture(scope="module")
def evaluated(small_world, tmp_path_factory, standard_promotion):
    """(the folder, seconds, the log, the evaluation sets)."""
    _, small = small_world
    folder, log = tmp_path_factory.mktemp("evaluations"), []
    eval_sets = evaluate.read(small)
    settings = dict(rates=RATES, steps=STEPS, resamples=20, command="here")
    seconds = evaluate.run(small, folder, eval_sets, log_fn=log.append, **settings)
    return folder, seconds, log, eval_sets


def test_each_model_has_an_evaluation_with_its_role(evaluated):
    folder, seconds, log, eval_sets = evaluated
    assert list(eval_sets) == ["forget", "retain"]
    abouts = {
        name: records.read(folder / name / "about.json")
        for name in ("original", "retrained", "blur_npo")
    }
    assert set(seconds["evaluation"]) == set(abouts)
    assert all(x > 0 for each in seconds.values() for x in each.values())
    roles = {name: about["role"] for name, about in abouts.items()}
    assert roles["blur_npo"] == "unlearned" and roles["original"] == "original"
    assert (
        abouts["blur_npo"]["method"] == "blur.npo" and abouts["blur_npo"]["seed"] == 0
    )
    assert abouts["retrained"]["retrained"] is None
    assert abouts["original"]["retrained"].endswith("retrained")
    assert len({about["params_digest"] for about in abouts.values()}) == 3
    assert log[0] == "retrained:" and "blur_npo:" in log


def test_the_original_knows_what_the_retrained_does_not(evaluated):
    folder, *_ = evaluated
    found = {
        name: records.read(folder / name / "metrics.json")
        for name in ("original", "retrained")
    }
    known, unknown = (
        found[x]["tasks"]["forget"]["probability"]["value"] for x in found
    )
    assert known > 0.8 > 0.5 > unknown
    assert found["original"]["overall"]["forget_quality"]["value"] < 0.5
    assert "forget_quality" not in found["retrained"]["overall"]


def test_the_training_log_is_in_the_folder_and_in_the_report(evaluated, tmp_path):
    folder, *_ = evaluated
    lines = (folder / "blur_npo" / "training.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert len(steps) == STEPS and steps == sorted(set(steps))
    runs = read.load([folder])
    assert [run.name for run in runs] == ["original", "retrained", "blur_npo"]
    page = report.write(runs, tmp_path, examples=2).read_text(encoding="utf-8")
    assert 'id="training"' in page and "blur_npo" in page
    assert page.count("<details") == 2


def test_a_second_run_evaluates_nothing(evaluated, small_world):
    folder, _, _, eval_sets = evaluated
    log = []
    settings = dict(rates={}, resamples=20, command="here")
    evaluate.run(small_world[1], folder, eval_sets, log_fn=log.append, **settings)
    assert [line for line in log if line.startswith("Nothing changed")] == log[1::2]
    assert len(log) == 4


def test_unlearning_starts_from_the_model_each_time(evaluated, small_world):
    folder, _, _, eval_sets = evaluated
    _, small = small_world
    runner = unlearn.runner(
        small,
        evaluate.methods.methods()["blur.npo"],
        unlearn.tables(small),
        steps=STEPS,
        batch_size=evaluate.BATCH_SIZE,
    )
    params, _ = unlearn.run(runner, rate=RATES["blur.npo"], seed=0)
    about = records.read(folder / "blur_npo" / "about.json")
    assert records.params_digest(params) == about["params_digest"]


def test_a_method_that_is_not_known_is_refused(small_world, tmp_path):
    with pytest.raises(ValueError, match="blur.npo"):
        evaluate.run(small_world[1], tmp_path, {}, rates={"blur.npoo": 1e-3})
    assert not list(tmp_path.iterdir())


def of_tofu(small):
    return small._replace(about={"config": {"facts": {"source": "tofu"}}})


def test_a_missing_table_of_tofu_is_named(small_world, tmp_path):
    with pytest.raises(FileNotFoundError, match="forget01_perturbed"):
        evaluate.read(of_tofu(small_world[1]), "01", str(tmp_path))


@there("tofu", "forget05_perturbed.jsonl")
def test_a_world_of_tofus_authors_has_all_tables_of_tofu(small_world):
    found = evaluate.read(of_tofu(small_world[1]), "05", str(DATA))
    assert {name: len(rows) for name, rows in found.items()} == {
        "forget": 200,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
        "holdout": 200,
    }


@pytest.mark.parametrize(
    "method, name",
    [("blur.npo", "blur_npo"), ("openunlearning.npo", "npo"), ("surgery", "surgery")],
)
def test_names_of_folders(method, name):
    assert evaluate.short(method) == name
