# SPDX-License-Identifier: Apache-2.0
"""TOFU's scores: three questions by hand, and the 16 official runs."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from jaxunlearn import metrics

HERE = Path(__file__).resolve()
DATA = Path(os.environ.get("JAXUNLEARN_DATA") or HERE.parents[3] / "shared" / "data")
LOGS = DATA.expanduser() / "tofu_reference_logs"
FIELDS = {
    "correct_nll": "avg_gt_loss",
    "wrong_nll": "average_perturb_loss",
    "paraphrased_nll": "avg_paraphrased_loss",
    "rouge": "rougeL_recall",
}
NAMES = {"probability": "prob", "rouge": "rougeL_recall", "truth_ratio": "truth_ratio"}
there = pytest.mark.skipif(
    not (LOGS / "expected.json").is_file(),
    reason=f"no TOFU logs in {LOGS}; set JAXUNLEARN_DATA to the folder above them",
)


def log(p):
    return -np.log(np.array(p))


# Two wrong answers each; geometric means 0.2, 0.3 and 0.4, arithmetic 0.25, 0.3, 0.5.
ROWS = metrics.TofuRows(
    correct_nll=log([0.5, 0.2, 0.8]),
    wrong_nll=log([[0.1, 0.4], [0.3, 0.3], [0.2, 0.8]]),
    paraphrased_nll=log([0.4, 0.15, 0.4]),
    rouge=np.array([1.0, 0.5, 0.3]),
)
SETS = ("forget", "retain", "real_authors", "world_facts")


def runs():
    files = sorted(LOGS.glob("*.json.gz"))
    return {file.name.removesuffix(".json.gz"): file for file in files}


def read(file):
    with gzip.open(file) as opened:
        sets = json.load(opened)
    return {
        name: metrics.TofuRows(**{k: sets[name][v] for k, v in FIELDS.items()})
        for name in SETS
    }


def test_three_questions_by_hand():
    scores = metrics.tofu_scores(dict.fromkeys(SETS, ROWS))
    # Ratios 1/2, 2 and 1.
    truth = {"forget": (0.5 + 0.5 + 1) / 3, "others": (0.5 + 0 + 0) / 3}
    options = (0.5 / 1.0 + 0.2 / 0.8 + 0.8 / 1.8) / 3
    for name, found in scores.items():
        wanted = {
            "probability": options if name in SETS[2:] else 0.5,
            "rouge": 0.6,
            "truth_ratio": truth.get(name, truth["others"]),
        }
        assert found == pytest.approx(wanted, rel=1e-12), name
    nine = [0.5, 0.6, 1 / 6] + 2 * [options, 0.6, 1 / 6]
    utility = metrics.model_utility(scores)
    assert utility == pytest.approx(9 / sum(1 / x for x in nine), rel=1e-12)


def test_the_arithmetic_mean_of_wrong_answers():
    ratios = metrics.tofu_ratios(ROWS, mean="arithmetic")
    np.testing.assert_allclose(ratios, [0.625, 2.0, 1.25], rtol=1e-12)
    assert ratios.dtype == np.float64


def test_a_collapsed_model_has_finite_scores():
    far = ROWS._replace(paraphrased_nll=[900.0, 2000.0, 0.0], correct_nll=[900.0] * 3)
    scores = metrics.tofu_scores({"forget": far, "real_authors": far})
    assert scores["forget"]["truth_ratio"] == pytest.approx(0.4 / 3)
    assert scores["forget"]["probability"] == 0.0


def broken(**fields):
    return {"retain": ROWS._replace(**fields)}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"retian": ROWS}, "Did you mean 'retain'"),
        (broken(correct_nll=[1.0, np.nan, 1.0]), r"correct_nll without NaN.*\(1,\)"),
        (broken(rouge=[0.5]), "one shape"),
        (broken(wrong_nll=[1.0, 1.0, 1.0]), "wrong_nll with 2 axes"),
        (broken(wrong_nll=np.ones((3, 0))), "at least one value in wrong_nll"),
        (broken(wrong_nll=np.ones((2, 5))), "one shape"),
    ],
)
def test_bad_rows(sets, message):
    with pytest.raises(ValueError, match=message):
        metrics.tofu_scores(sets)


def test_utility_needs_all_nine():
    scores = metrics.tofu_scores(dict.fromkeys(SETS[:3], ROWS))
    with pytest.raises(KeyError, match="'world_facts'.*harmonic_mean"):
        metrics.model_utility(scores)
    del scores["retain"]["rouge"]
    with pytest.raises(KeyError, match="scores of 'retain'.*'rouge'"):
        metrics.model_utility({**scores, "world_facts": scores["retain"]})


@there
@pytest.mark.parametrize("name", runs())
def test_an_official_run(name):
    wanted = json.loads((LOGS / "expected.json").read_text())["utility"][name]
    scores = metrics.tofu_scores(read(runs()[name]))
    for each in SETS:
        for ours, theirs in NAMES.items():
            value = wanted[each][theirs]
            assert scores[each][ours] == pytest.approx(value, abs=1e-9), (each, ours)
    utility = metrics.model_utility(scores)
    assert utility == pytest.approx(wanted["model_utility"], abs=1e-9)


@there
def test_forget_quality_of_official_pairs():
    wanted = json.loads((LOGS / "expected.json").read_text())["forget_quality"]
    assert len(runs()) == 16
    assert len(wanted) == 20
    ratios = {
        name: metrics.tofu_ratios(read(file)["forget"]) for name, file in runs().items()
    }
    for pair, values in wanted.items():
        one, other = pair.split(" vs ")
        test = metrics.forget_quality(ratios[one], ratios[other])
        assert test.pvalue == pytest.approx(values["p_value"], rel=1e-9), pair
        assert test.statistic == pytest.approx(values["ks_stat"], abs=1e-9), pair


@there
def test_rouge_of_official_generations():
    pytest.importorskip("rouge_score")
    (file,) = [file for name, file in runs().items() if "phi_retain99_wd0.01" in name]
    with gzip.open(file) as opened:
        sets = json.load(opened)
    for name in ("forget", "real_authors"):
        _, generated, wanted = zip(*sets[name]["generated_text"], strict=True)
        found = metrics.rouge(generated, wanted, tokenizer="ascii")
        for kind in ("rouge1_recall", "rougeL_recall"):
            np.testing.assert_allclose(found[kind], sets[name][kind], atol=1e-9)


def test_a_separated_pair_has_the_smallest_p_value():
    n = 40
    test = metrics.forget_quality(np.arange(n), np.arange(n) + n)
    assert test.statistic == 1.0
    assert test.pvalue == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9)
