# SPDX-License-Identifier: Apache-2.0
"""Folds share no value, and a shared value is named."""

import pytest

from jaxunlearn import attacks


def fact(name, answer=0, **more):
    return {
        "question": f"What is {name}?",
        "choices": list("wxyz"),
        "answer": answer,
    } | {
        "name": name,
        **more,
    }


def test_subjects_stay_together_in_folds_of_similar_size():
    facts = [fact(f"n{i % 10}", question=f"q{i}") for i in range(33)]
    folds = attacks.make_folds(facts, 4, by="name", seed=3)
    assert sorted(map(len, folds)) == [7, 7, 9, 10]  # each name has 3 or 4 facts
    names = [{f["name"] for f in fold} for fold in folds]
    assert sum(map(len, names)) == len(set().union(*names)) == 10
    assert sorted(f["question"] for fold in folds for f in fold) == sorted(
        f["question"] for f in facts
    )
    attacks.check_folds(folds, ("name", "question"))
    again = attacks.make_folds(facts, 4, by="name", seed=3)
    other = attacks.make_folds(facts, 4, by="name", seed=4)
    assert folds == again != other


def test_case_and_white_space_of_a_subject_are_ignored():
    facts = [fact(name) for name in ("Ada Bor", "ada  bor", "Cal", "Dan")]
    folds = attacks.make_folds(facts, 3, by="name")
    assert max(len({f["name"].split()[0].lower() for f in x}) for x in folds) == 1


@pytest.mark.parametrize("by", ["name", ("question", "name")])
def test_a_shared_fact_is_refused_by_its_name(by):
    folds = [[fact("Ada"), fact("Cal")], [fact("Dan")], [fact("Bo"), fact(" ADA")]]
    with pytest.raises(ValueError, match="ADA.* in fold 0 and in fold 2"):
        attacks.check_folds(folds, by)
    attacks.check_folds(folds[:2], by)
    # A value may be in one fold twice.
    attacks.check_folds([[fact("Ada"), fact("Ada")], [fact("Dan")]], by)


def test_each_member_of_a_list_counts_as_a_value():
    statements = [
        ["x is w.", "x was w."],
        "y is z.",
        ["X  was W.", "v is u."],
        ["v is u."],
    ]
    facts = [
        fact(f"n{i}", statement=each) for i, each in enumerate([*statements, "t", []])
    ]
    folds = attacks.make_folds(facts, 4, by="statement", seed=1)
    names = sorted(sorted(f["name"] for f in fold) for fold in folds)
    assert names == [["n0", "n2", "n3"], ["n1"], ["n4"], ["n5"]]
    attacks.check_folds(folds, ("question", "statement"))
    with pytest.raises(ValueError, match="statement 'X  was W.' in fold 0 and in"):
        attacks.check_folds([facts[:2], facts[2:]], "statement")
    pairs = [[fact(n, statement=[[x, "c"]])] for n, x in ("ab", "dB")]
    with pytest.raises(ValueError, match="in fold 0 and in fold 1"):
        attacks.check_folds(pairs, "statement")


def test_invalid_folds_are_refused():
    with pytest.raises(ValueError, match="num_folds=3 and 2 values of 'name'"):
        attacks.make_folds([fact("a"), fact("b"), fact("A")], 3, by="name")
    with pytest.raises(ValueError, match="num_folds=1"):
        attacks.make_folds([fact("a"), fact("b")], 1)
    with pytest.raises(KeyError, match="'author'.*Add it"):
        attacks.make_folds([fact("a"), fact("b")], 2, by="author")
    with pytest.raises(ValueError, match="none in fold 1"):
        attacks.check_folds([[fact("a")], []])
    with pytest.raises(ValueError, match="at least two folds, got 1"):
        attacks.check_folds([[fact("a")]])
