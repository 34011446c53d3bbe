# SPDX-License-Identifier: Apache-2.0
import collections
import json

import numpy as np
import pytest

from jaxunlearn.data.benchmarks import mmlu, rtt_facts
from tests.data.official_test import DATA, there

BORN = rtt_facts.birthdays()


def test_names_are_distinct_and_folds_have_one_size():
    assert len(BORN) == 1570 == len({row["name"] for row in BORN})
    counts = collections.Counter(row["split"] for row in BORN)
    assert counts == {f"split_{fold}": 157 for fold in range(10)}


def test_choices_are_four_years_and_every_index_occurs():
    for row in BORN:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == row["year"]
        assert row["question"] == f"When was {row['name']} born?"
    places = np.bincount([row["answer"] for row in BORN], minlength=4)
    # Each place has 1570 / 4 = 392.5 rows, standard deviation 17.2: five of them.
    assert (abs(places - 392.5) < 5 * 17.2).all()
    years = np.asarray([int(row["year"]) for row in BORN])
    assert abs(years.mean() - 1980) < 5 * 30 / 1570**0.5
    assert abs(years.std() - 30) < 5 * 30 / (2 * 1570) ** 0.5


def test_a_fold_does_not_depend_on_the_other_folds():
    three = rtt_facts.birthdays(folds=3)
    assert three == BORN[: 3 * 157]
    assert rtt_facts.birthdays() == BORN
    other = rtt_facts.birthdays(seed=1)
    assert [row["name"] for row in other] != [row["name"] for row in BORN]
    assert [row["year"] for row in other] != [row["year"] for row in BORN]


def test_years_of_folds_are_independent():
    """Years do not depend on family or given names, up to chance."""
    years = np.asarray([int(row["year"]) for row in BORN], float)
    for part in (0, 1):
        groups = collections.defaultdict(list)
        for row, year in zip(BORN, years, strict=True):
            groups[row["name"].split()[part]].append(year)
        within = sum(np.var(g) * len(g) for g in groups.values())
        share = 1 - within / (years.var() * len(years))  # of the variance explained
        expected = (len(groups) - 1) / (len(years) - 1)
        assert abs(share - expected) < 5 * (2 * expected / len(years)) ** 0.5


def test_too_many_names_are_refused():
    with pytest.raises(ValueError, match="distinct names, got folds=900 of size=157"):
        rtt_facts.birthdays(folds=900)


@pytest.mark.parametrize("wrong", rtt_facts.WRONG)
def test_statements_contain_the_year_or_a_wrong_one(wrong):
    statements = rtt_facts.corpus(BORN[:20], wrong=wrong)
    assert len(statements) == 60 and len({row["text"] for row in statements}) == 60
    for number, fact in enumerate(BORN[:20]):
        three = statements[3 * number : 3 * number + 3]
        found = [
            [year for year in fact["choices"] if year in row["text"]] for row in three
        ]
        assert all(fact["name"] in row["text"] for row in three)
        assert all(len(years) == 1 for years in found)
        years = [years[0] for years in found]
        if wrong == "none":
            assert years == [fact["year"]] * 3
        else:
            assert fact["year"] not in years
            assert len(set(years)) == (1 if wrong == "fixed" else 3)
        assert three[0]["split"] == fact["split"]
        assert {fact["year"], *three[0]["wrong_answers"]} == set(fact["choices"])


def test_the_authors_files_are_read_with_years_as_texts(tmp_path):
    place = tmp_path / "rtt_facts" / "dates-years-trimmed"
    place.mkdir(parents=True)
    row = {"question": "When?", "choices": [1901, 1902, 1903, 1904], "answer": 1}
    file = place / "split_0.jsonl"
    file.write_text(json.dumps(row | {"correct_year": 1902}) + "\n")
    choices = ["1901", "1902", "1903", "1904"]
    assert rtt_facts.read("dates/split_0", tmp_path) == [
        row | {"choices": choices, "correct_year": "1902"}
    ]
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="'correct_year' are missing"):
        rtt_facts.read("dates/split_0", tmp_path)
    assert rtt_facts.read("birthdays") == BORN


def test_categories_do_not_repeat_questions():
    subjects = " ".join(rtt_facts.GROUPS.values()).split()
    assert len(set(subjects)) == len(subjects)
    rows = [
        {"subject": s, "question": f"{s} {i}", "choices": list("abcd"), "answer": 0}
        for s in subjects
        for i in (0, 1, 2, 2)
    ]
    drawn = rtt_facts.categories(rows, size=3)
    assert collections.Counter(x["split"] for x in drawn) == dict.fromkeys(
        rtt_facts.GROUPS, 3
    )
    assert len({row["question"] for row in drawn}) == 30
    for row in drawn:
        assert row["subject"] in rtt_facts.GROUPS[row["split"]].split()
    with pytest.raises(ValueError, match="needs 4 questions of 'geography', got 3"):
        rtt_facts.categories(rows, size=4)


@there("mmlu", "test.jsonl.gz")
def test_mmlu_has_enough_questions_of_every_field():
    test = mmlu.read("test", DATA)
    drawn = rtt_facts.categories(test)
    assert len(drawn) == 1570
    assert drawn == rtt_facts.categories(test) != rtt_facts.categories(test, seed=1)
    missing = {row["subject"] for row in test} - set(
        " ".join(rtt_facts.GROUPS.values()).split()
    )
    assert missing == {"global_facts", "miscellaneous", "professional_accounting"}
