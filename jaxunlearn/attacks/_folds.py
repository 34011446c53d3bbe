# SPDX-License-Identifier: Apache-2.0
"""Folds of facts that share nothing, so no fold helps to guess another one."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks, _text

Fact = Mapping[str, Any]
"""A row with `question` (a text), `choices` (texts), `answer` (the index of the correct
choice) and, for the format "statement", `statement` (a text or several)."""


def make_folds(
    facts: Sequence[Fact], num_folds: int = 5, *, by: str = "question", seed: int = 0
) -> list[list[Fact]]:
    """Divides facts into folds of similar size; facts that share `by` stay together.

    If a row has a list in `by`, each member is a value: facts that share one of them
    stay together.

    Args:
        facts: rows that have the column `by`.
        num_folds: number of folds, >= 2; the paper has 5.
        by: the column of which no value may be in two folds: the subject of a fact.
        seed: orders the subjects, a whole number >= 0.
    Returns:
        num_folds lists of facts; each subject is in one of them.
    Raises:
        KeyError: if a fact lacks `by`.
        ValueError: if there are fewer subjects than folds.
    References: https://arxiv.org/abs/2410.08827
    """
    _checks.positive_int("make_folds", num_folds=num_folds)
    _checks.not_negative("make_folds", seed=seed)
    first: dict[Hashable, int] = {}  # value -> the first fact that has it
    parent = list(range(len(facts)))  # union-find: the root is a subject's first fact

    def root(index):
        while parent[index] != index:
            index = parent[index]
        return index

    for index, fact in enumerate(facts):
        for member in _members(_value("make_folds", fact, by)):
            a, b = root(index), root(first.setdefault(_normalized(member), index))
            parent[max(a, b)] = min(a, b)
    subjects: dict[int, list[Fact]] = {}
    for index, fact in enumerate(facts):
        subjects.setdefault(root(index), []).append(fact)
    if not 2 <= num_folds <= len(subjects):
        raise ValueError(
            "make_folds needs 2 <= num_folds <= the number of subjects, got "
            f"num_folds={num_folds} and {len(subjects)} values of {by!r}. "
            "Take more facts or fewer folds."
        )
    order = np.random.default_rng(seed).permutation(len(subjects))
    groups = [list(subjects.values())[i] for i in order]
    folds: list[list[Fact]] = [[] for _ in range(num_folds)]
    # The largest subjects first, each into the fold with the fewest facts.
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=len).extend(group)
    return folds


def check_folds(
    folds: Sequence[Sequence[Fact]], by: str | Sequence[str] = "question"
) -> None:
    """Raises unless there are two or more folds with facts that share no value.

    Args:
        folds: the rows of each fold.
        by: columns; each value of them may be in one fold only. Case and white space
            are ignored; each member of a list is a value.
    Raises:
        ValueError: if two folds share a value (it and both folds are named), a fold is
            empty, or there are fewer than two folds.
        KeyError: if a fact lacks a column.
    """
    columns = (by,) if isinstance(by, str) else tuple(by)
    if len(folds) < 2:
        raise ValueError(
            f"RTT needs at least two folds, got {len(folds)}. Use make_folds."
        )
    for column in columns:
        seen: dict[Hashable, int] = {}
        for index, fold in enumerate(folds):
            if not fold:
                raise ValueError(
                    f"RTT needs a fact in every fold, got none in fold {index}. Make "
                    "fewer folds."
                )
            for fact in fold:
                for value in _members(_value("RTT", fact, column)):
                    first = seen.setdefault(_normalized(value), index)
                    if first == index:
                        continue
                    raise ValueError(
                        f"RTT needs folds that share no fact, got {column} {value!r} "
                        f"in fold {first} and in fold {index}. Remove it from one, or "
                        f"make the folds with make_folds(by={column!r})."
                    )


def _value(owner: str, fact: Fact, column: str) -> Any:
    fix = "Add it to the facts, or pass another column as `by`."
    _checks.has_keys(owner, "column", [column], fact, fix)
    return fact[column]


def _members(value: Any) -> Sequence[Any]:
    """The values of a column as a sequence: the members of a list, or one value."""
    return value if isinstance(value, list | tuple) else (value,)


def _normalized(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(map(_normalized, value))
    return " ".join(_text.caseless(value).split()) if isinstance(value, str) else value
