# SPDX-License-Identifier: Apache-2.0
"""Facts to attack: questions with an answer and choices, to forget and to retain."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import capitals as world
from jaxunlearn.workflows import records
from jaxunlearn.workflows.evaluation import sources, tasks

NAMES = ("forget", "retain")
NUM_CHOICES = 4

Fact = Mapping[str, Any]


class FactSet(NamedTuple):
    """The facts that a model is queried about.

    Attributes:
        forget, retain: rows with `id`, `question`, `text` (the answer), `choices`,
            `answer` (the index of the right choice) and `subject`; facts of one subject
            are in the same fold.
    """

    forget: Sequence[Fact]
    retain: Sequence[Fact]

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        return records.digest([list(map(dict, rows)) for rows in self])


def read(settings: Mapping[str, Any], folder: str = "") -> FactSet:
    """The facts that a config describes.

    Args:
        settings: "forget" and "retain", each as evaluation.sources.read takes it, or
            `source` "capitals" with `group` (a continent) and `others` (True for all
            other continents). Optionally `rows`, the maximum number of rows, 0 for all;
            and `block`, the number of consecutive rows with the same subject, 20 for
            TOFU.
        folder: the parent folder of the benchmarks.
    Raises:
        ValueError, FileNotFoundError: as evaluation.sources.read and `from_rows`.
    """
    for name in settings:
        _checks.one_of("The attack's facts", NAMES, name=name)
    fix = "Name a source for each."
    _checks.has_keys("The attack", "facts", NAMES, settings, fix)
    found = {name: _read(name, dict(settings[name]), folder) for name in NAMES}
    tasks.overlap({name: task for name, (task, _) in found.items()})
    return FactSet(*(facts for _, facts in (found[name] for name in NAMES)))


class RowFile(NamedTuple):
    """A file of rows and its columns, as evaluation.sources.read_file takes them."""

    path: str | os.PathLike
    question: str = ""
    answer: str = "answer"


def read_files(
    forget: RowFile, retain: RowFile, *, max_rows: int = 0, seed: int = 0
) -> FactSet:
    """Facts from two files of rows.

    Args:
        forget, retain: the files.
        max_rows: maximum number of rows of each file, drawn with `seed`; 0 for all.
        seed: of the draw and of the choices.
    Raises:
        FileNotFoundError, ValueError: as evaluation.sources.read_file and `from_rows`.
    """
    found = {}
    for name, file in zip(NAMES, (forget, retain), strict=True):
        rows = sources.read_file(file.path, question=file.question, answer=file.answer)
        found[name] = _draw(rows, max_rows, seed)
    made = {name: tasks.make(name, rows) for name, rows in found.items()}
    tasks.overlap(made)
    return FactSet(
        *(
            from_rows(_with_wordings(made[name].rows, found[name]), seed=seed)
            for name in NAMES
        )
    )


def from_rows(
    rows: Sequence[tasks.Row], *, block: int = 1, seed: int = 0
) -> list[Fact]:
    """Rows of a task as facts.

    The wrong choices are a row's `choices`, or else its `perturbed_answer`, or else
    answers of other rows; the last two are put in a random order.

    Args:
        rows: with `id`, `question`, `answer` and optionally `subject`.
        block: number of consecutive rows with the same subject.
        seed: of the order and of the draw from other rows.
    Raises:
        ValueError: naming the question, if it has fewer than two different choices.
    """
    answers = list(dict.fromkeys(row["answer"] for row in rows))
    made = []
    for number, row in enumerate(rows):
        right = row["answer"]
        rng = np.random.default_rng([seed, number])
        if "choices" in row:
            choices = list(row["choices"])
        else:
            wrong = list(row.get("perturbed_answer", ()))[: NUM_CHOICES - 1]
            if not wrong:
                others = [x for x in answers if x != right]
                drawn = rng.permutation(len(others))[: NUM_CHOICES - 1]
                wrong = [others[i] for i in drawn]
            choices = [right, *wrong]
            choices = [choices[i] for i in rng.permutation(len(choices))]
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise ValueError(
                f"The attack needs two or more different choices for each question, "
                f"got {choices!r} for {row['question']!r}. Give `choices` or "
                "`perturbed_answer`, rows with different answers, or remove the row."
            )
        subject = row.get("subject", row["question"])
        made.append(
            {
                "id": row["id"],
                "question": row["question"],
                "text": right,
                "choices": choices,
                "answer": choices.index(right),
                "subject": number // block if block > 1 else subject,
            }
        )
    return made


def _draw(rows: list[Any], max_rows: int, seed: int) -> list[Any]:
    """At most max_rows rows, drawn at random, in their order."""
    if not max_rows or len(rows) <= max_rows:
        return rows
    chosen = np.random.default_rng(seed).permutation(len(rows))[:max_rows]
    return [rows[i] for i in sorted(chosen)]


def _with_wordings(checked: Sequence[tasks.Row], rows: Sequence[Any]):
    """The rows, and each row again with each of its `wordings` as the question."""
    found = []
    for row, source in zip(checked, rows, strict=True):
        wordings = source.get("wordings") or []
        if isinstance(wordings, str) or not all(isinstance(x, str) for x in wordings):
            raise ValueError(
                f"The column 'wordings' needs a list of texts, got {wordings!r} in the "
                f"row {row['id']!r}."
            )
        row = {**row, "subject": row["question"]}
        found.append(row)
        for number, wording in enumerate(wordings, start=1):
            found.append({**row, "id": f"{row['id']}/{number}", "question": wording})
    return found


def _read(name, settings, folder):
    max_rows, block = settings.pop("rows", 0), settings.pop("block", 1)
    owner = f"The attack's facts {name!r}"
    _checks.not_negative(owner, rows=max_rows)
    _checks.positive_int(owner, block=block)
    if settings.get("source") == "capitals":
        task = _capitals(name, settings)
    else:
        (task,) = sources.read({name: settings}, folder).values()
    rows = list(task.rows)[: max_rows or None]
    return task, from_rows(rows, block=block)


def _capitals(name, settings) -> tasks.Task:
    """Capitals in a wording that no recipe of this repository trains on."""
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
