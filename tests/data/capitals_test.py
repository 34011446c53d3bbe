# SPDX-License-Identifier: Apache-2.0
import collections

import pytest

from jaxunlearn.data import capitals as facts

CAPITALS = facts.capitals()
WORLD = facts.world()


def find(subject):
    return next(fact for fact in CAPITALS if fact.subject == subject)


def test_capitals_are_unique_and_complete():
    assert len({fact.subject for fact in CAPITALS}) == len(CAPITALS)
    assert len({fact.answer for fact in CAPITALS}) == len(CAPITALS)
    groups = collections.Counter(fact.group for fact in CAPITALS)
    assert groups["Europe"] >= 35 and len(CAPITALS) - groups["Europe"] >= 40
    assert min(groups.values()) >= 4  # enough for a 4-way choice
    for fact in CAPITALS:
        assert fact.aliases[0] == fact.answer
        assert len(set(fact.aliases)) == len(fact.aliases)
        assert fact.subject.strip() == fact.subject and fact.answer[0].isupper()


def test_no_name_is_an_answer_for_two_capitals():
    for fact in CAPITALS:
        answered = [other for other in CAPITALS if facts.is_answer(other, fact.answer)]
        assert answered == [fact]


def test_phrasings_are_split_two_to_one_and_end_before_the_name():
    everything = []
    for kind in facts.KINDS:
        train, test = (facts.phrasings(kind, split) for split in facts.SPLITS)
        assert len(train) == 2 * len(test) and len(test) >= 1
        everything += train + test
    assert len(facts.phrasings("statement", "test")) >= 3
    assert len(set(everything)) == len(everything)
    for phrasing in everything:
        assert phrasing.count(facts.PLACE) == 1 and phrasing == phrasing.strip()
        assert "Paris" not in find("France").prompt(phrasing)


def test_prompt_puts_the_subject_in():
    fact = find("the Netherlands")
    assert fact.prompt("The capital of {country} is") == (
        "The capital of the Netherlands is"
    )
    with pytest.raises(ValueError, match="needs a phrasing with {country}"):
        fact.prompt("The capital is")


def test_world_facts_are_unique_and_their_wrong_answers_wrong():
    assert 40 <= len(WORLD) <= 80
    assert len({cloze.prompt for cloze in WORLD}) == len(WORLD)
    for cloze in WORLD:
        assert cloze.aliases[0] == cloze.answer and len(set(cloze.wrong)) >= 3
        assert not any(facts.is_answer(cloze, wrong) for wrong in cloze.wrong)
        assert "capital" not in cloze.prompt
        assert cloze.prompt == cloze.prompt.strip()


@pytest.mark.parametrize("fact", CAPITALS + WORLD, ids=lambda fact: fact.answer)
def test_choices_contain_the_right_answer_once(fact):
    options, index = facts.choices(fact, CAPITALS, seed=4)
    assert options[index] == fact.answer and len(set(options)) == len(options) == 4
    assert [facts.is_answer(fact, option) for option in options].count(True) == 1
    if isinstance(fact, facts.Fact):
        groups = {f.group for f in CAPITALS if f.answer in options}
        assert groups == {fact.group}


def test_choices_depend_on_seed_and_fact_not_on_the_pool_order():
    fact = find("France")
    first = facts.choices(fact, CAPITALS, seed=1)
    assert first == facts.choices(fact, CAPITALS[::-1], seed=1)
    assert any(first != facts.choices(fact, CAPITALS, seed=s) for s in range(2, 6))
    places = {facts.choices(f, CAPITALS)[1] for f in CAPITALS}
    assert places == {0, 1, 2, 3}


def test_choices_refuse_a_pool_that_is_too_small():
    with pytest.raises(ValueError, match="needs 3 wrong answers .*'France', got 1"):
        facts.choices(find("France"), [find("France"), find("Spain"), find("Japan")])


@pytest.mark.parametrize(
    "subject, text, right",
    [
        ("Italy", " Rome, and it is old.", True),
        ("Italy", "rome", True),
        ("Italy", ' **"Rome"**', True),
        ("Italy", "Rome's walls", True),
        ("Italy", " Romeo", False),
        ("Italy", " the city of Rome", False),
        ("Italy", "", False),
        ("Ukraine", " Kiev.", True),
        ("Ukraine", "Kyiv", True),
        ("the United States", " Washington, D.C.", True),
        ("the United States", "\nWashington", True),
        ("Colombia", "Bogota", True),
        ("Iceland", "Reykjavík", True),
        ("Mexico", "Mexico", False),
        ("Mexico", "Mexico City", True),
    ],
)
def test_is_answer_compares_the_beginning(subject, text, right):
    assert facts.is_answer(find(subject), text) is right


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind"):
        facts.phrasings("rhyme")
    with pytest.raises(ValueError, match="split"):
        facts.phrasings(split="validation")
