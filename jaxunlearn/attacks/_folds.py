# SPDX-License-Identifier: Apache-2.0
"""Folds of facts that share nothing, so that some cannot help to guess the others."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxunlearn import _checks

Fact = Mapping[str, Any]
"""A row with `question` (a text), `choices` (texts), `answer` (the number of the right
one) and, where statements are trained on, `statement` (a text or several)."""


def make_folds(
    facts: Sequence[Fact], k: int = 5, *, by: str = "question", seed: int = 0
) -> list[list[Fact]]:
    """Deals facts into k folds of like size; those that share `by` stay together.

    A list in `by` counts as several values: who shares one of them stays together.

    Args:
        facts: rows that have the column `by`.
        k: how many folds, >= 2; the paper's are 5.
        by: the column that no two folds may share: who or what a fact is about.
        seed: whole number >= 0.
    Returns:
        k lists of facts; each subject is in one of them.
    Raises:
        KeyError: if a fact lacks `by`.
        ValueError: if there are fewer subjects than folds.
    References: https://arxiv.org/abs/2410.08827
    """
    _checks.positive_int("make_folds", k=k)
    _checks.not_negative("make_folds", seed=seed)
    first: dict[Hashable, int] = {}  # value -> the first fact that has it
    parent = list(range(len(facts)))

    def top(number):  # the first of all facts that stay together with this one
        while parent[number] != number:
            number = parent[number]
        return number

    for number, fact in enumerate(facts):
        for member in _members(_value("make_folds", fact, by)):
            own, other = top(number), top(first.setdefault(_plain(member), number))
            parent[max(own, other)] = min(own, other)
    subjects: dict[int, list[Fact]] = {}
    for number, fact in enumerate(facts):
        subjects.setdefault(top(number), []).append(fact)
    if not 2 <= k <= len(subjects):
        raise ValueError(
            f"make_folds needs 2 <= k <= the number of subjects, got k={k} and "
            f"{len(subjects)} values of {by!r}. Take more facts or fewer folds."
        )
    order = np.random.default_rng(seed).permutation(len(subjects))
    groups = [list(subjects.values())[i] for i in order]
    folds: list[list[Fact]] = [[] for _ in range(k)]
    # The largest subjects first, each to the fold that has the fewest facts.
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=len).extend(group)
    return folds


def check_folds(
    folds: Sequence[Sequence[Fact]], by: str | Sequence[str] = "question"
) -> None:
    """Raises unless folds have facts and no two of them share one.

    Args:
        folds: rows of each fold.
        by: columns; a value of any of them may be in one fold alone. Case and blanks
            do not count; of a list each member is a value.
    Raises:
        ValueError: naming the shared fact and both folds, if one is shared, if a fold
            is empty or if there are fewer than two.
        KeyError: if a fact lacks a column.
    """
    columns = (by,) if isinstance(by, str) else tuple(by)
    if len(folds) < 2:
        raise ValueError(f"RTT needs at least two folds, got {len(folds)}.")
    for column in columns:
        seen: dict[Hashable, int] = {}
        for number, fold in enumerate(folds):
            if not fold:
                raise ValueError(
                    f"RTT needs a fact in every fold, got none in fold {number}. Make "
                    "fewer folds."
                )
            for fact in fold:
                for value in _members(_value("RTT", fact, column)):
                    first = seen.setdefault(_plain(value), number)
                    if first == number:
                        continue
                    raise ValueError(
                        f"RTT needs folds that share no fact, but {column} {value!r} "
                        f"is in fold {first} and in fold {number}: what is trained in "
                        "one would be asked in the other. Take it out of one, or deal "
                        f"the facts anew with make_folds(by={column!r})."
                    )


def rotation(
    folds: Sequence[Sequence[Fact]], held_out: int
) -> tuple[list[Fact], list[Fact]]:
    """(T, V): the facts of all folds but one, and those of the fold held out."""
    if not 0 <= held_out < len(folds):
        raise ValueError(
            f"rotation needs held_out of 0 to {len(folds) - 1}, got {held_out}."
        )
    known = [fact for i, fold in enumerate(folds) if i != held_out for fact in fold]
    return known, list(folds[held_out])


def _value(owner: str, fact: Fact, column: str) -> Any:
    fix = "Add it, or name another in `by`."
    _checks.has_keys(owner, "column", [column], fact, fix)
    return fact[column]


def _members(value: Any) -> Sequence[Any]:
    """The values that a column holds: each of a list, or the one."""
    return value if isinstance(value, list | tuple) else (value,)


def _plain(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return " ".join(value.split()).casefold() if isinstance(value, str) else value
