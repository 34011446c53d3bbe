# SPDX-License-Identifier: Apache-2.0
"""Facts to attack: questions with an answer and choices, forgotten and retained."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import capitals as world
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import tasks

NAMES = ("forget", "retain")

Fact = Mapping[str, Any]


class Facts(NamedTuple):
    """What is asked.

    Attributes:
        forget, retain: rows with `id`, `question`, `text` (the answer), `choices`,
            `answer` (the number of the right one) and `subject`; no two folds share a
            subject.
    """

    forget: Sequence[Fact]
    retain: Sequence[Fact]

    @property
    def digest(self) -> str:
        """Of all rows."""
        return folders.digest([list(map(dict, rows)) for rows in self])


def read(settings: Mapping[str, Any], folder: str = "") -> Facts:
    """The facts that a config names.

    Args:
        settings: "forget" and "retain", each as tasks.read takes it, or `source`
            "capitals" with `group` (a continent) and `others` (all but those). On top,
            `rows`: how many at most, the first, 0 for all; `block`: so many rows that
            follow one another are of one subject, 20 for TOFU.
        folder: above the benchmarks' own.
    Raises:
        ValueError, FileNotFoundError: as tasks.read, and for rows with neither
            `choices` nor `perturbed_answer`, or with too few wrong answers.
    """
    for name in settings:
        _checks.one_of("The attack's facts", NAMES, name=name)
    fix = "Name a source for each."
    _checks.has_keys("The attack", "facts", NAMES, settings, fix)
    found = {name: _read(name, dict(settings[name]), folder) for name in NAMES}
    tasks.overlap({name: task for name, (task, _) in found.items()})
    return Facts(*(rows for _, rows in (found[name] for name in NAMES)))


def of_rows(rows: Sequence[tasks.Row], *, block: int = 1, seed: int = 0) -> list[Fact]:
    """Rows of a task as facts; wrong answers become choices in a drawn order."""
    made = []
    for number, row in enumerate(rows):
        right = row["answer"]
        if "choices" in row:
            choices = list(row["choices"])
        else:
            choices = [right, *list(row.get("perturbed_answer", ()))[:3]]
            draw = np.random.default_rng([seed, number])
            choices = [choices[i] for i in draw.permutation(len(choices))]
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(
                f"The attack needs two or more choices that differ for each question, "
                f"got {choices!r} for {row['question']!r}. Give `choices` or "
                "`perturbed_answer`, or leave the row out."
            )
        shared = {"id": row["id"], "question": row["question"], "text": right}
        subject = number // block if block > 1 else row["question"]
        made.append(
            shared
            | {"choices": choices, "answer": choices.index(right), "subject": subject}
        )
    return made


def _read(name, settings, folder):
    count, block = settings.pop("rows", 0), settings.pop("block", 1)
    owner = f"The attack's facts {name!r}"
    _checks.not_negative(owner, rows=count)
    _checks.positive_int(owner, block=block)
    if settings.get("source") == "capitals":
        task = _capitals(name, settings)
    else:
        (task,) = tasks.read({name: settings}, folder).values()
    rows = list(task.rows)[: count or None]
    return task, of_rows(rows, block=block)


def _capitals(name, settings) -> tasks.Task:
    """Capitals in a wording that no recipe here trains on."""
    for key in settings:
        _checks.one_of("The attack's capitals", ("source", "group", "others"), key=key)
    pool = world.capitals()
    groups = sorted({fact.group for fact in pool})
    group = settings.get("group", "Europe")
    _checks.one_of("The attack's capitals", groups, group=group)
    wanted = [f for f in pool if (f.group == group) != settings.get("others", False)]
    (phrasing, *_) = world.phrasings("statement", "test")
    rows = []
    for fact in wanted:
        options, _ = world.choices(fact, pool)
        row = {"id": fact.subject, "question": fact.prompt(phrasing)}
        rows.append(row | {"answer": fact.answer, "choices": options})
    return tasks.make(name, rows)
