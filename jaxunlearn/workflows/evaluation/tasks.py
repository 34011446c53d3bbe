# SPDX-License-Identifier: Apache-2.0
"""Tasks: named tables of questions, checked before a model is evaluated on them.

A row has `question` (or `prompt`) and `answer`. Optional columns:

* `paraphrased_answer`, and `perturbed_answer` (a list of wrong answers), for truth
  ratios;
* `choices` (a list with the answer in it), for multiple choice;
* `id`; a row without one gets "NAME/NUMBER".
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks, data
from jaxunlearn.data import table
from jaxunlearn.data.benchmarks import official

KINDS = ("forget", "retain", "options", "holdout")
KIND_OF_NAME = {"real_authors": "options", "world_facts": "options"}
KIND_OF_NAME |= {kind: kind for kind in KINDS}
COLUMNS = ("question", "answer", "paraphrased_answer", "perturbed_answer", "choices")

Row = Mapping[str, Any]


class Settings(NamedTuple):
    """How a model is prompted and scored; each of these changes the numbers.

    Attributes:
        prompt_format: how questions and answers are joined.
        length: maximum number of tokens of prompt and answer; 0 for the model's limit.
        new_tokens: maximum number of generated tokens; 0 generates nothing.
        compat: "" or "openunlearning", for that library's epsilon, its dropped last
            token, its floor of extraction strength and its words of ROUGE (a-z and
            0-9).
        gradnorm: whether to compute the attack GradNorm, which costs one gradient for
            each row.
        stops: a generated answer ends before the first of these texts.
    """

    prompt_format: data.PromptFormat = data.PromptFormat()
    length: int = 0
    new_tokens: int = 48
    compat: str = ""
    gradnorm: bool = True
    stops: Sequence[str] = ()

    def with_settings(self, settings: Mapping[str, Any]) -> "Settings":
        """These settings with some replaced; of `prompt_format` the given fields."""
        given = dict(settings)
        found = self.prompt_format.with_settings(given.pop("prompt_format", {}))
        return self._replace(prompt_format=found, **given)

    @classmethod
    def recorded(cls, about: Mapping[str, Any], task: str = "") -> "Settings":
        """The settings in an evaluation's about.json, of a task if it is named; one
        that is newer than the file has its default."""
        found = {key: x for key, x in about["settings"].items() if key in cls._fields}
        of_task = about["settings"].get("tasks", {}).get(task, {})
        return cls().with_settings(found).with_settings(of_task)

    def as_dict(self) -> dict[str, Any]:
        """The settings as files record them."""
        return self._asdict() | {"prompt_format": self.prompt_format.as_dict()}

    def by_name(self) -> dict[str, Any]:
        """Every setting by its dotted name, such as "prompt_format.end"."""
        found = self._asdict()
        fields = found.pop("prompt_format").as_dict()
        return found | {f"prompt_format.{name}": x for name, x in fields.items()}


class Task(NamedTuple):
    """One table of questions.

    Attributes:
        name: such as "forget".
        kind: one of KINDS: "forget" (a truth ratio near 1 is best), "retain" (near 0
            is best), "options" (near 0 is best, and the probability is normalised by
            the wrong answers) or "holdout" (rows that no model was trained on, for
            membership attacks: nothing is generated).
        rows: the rows, each with `id`.
        digest: SHA-256 of the rows.
        score: fields of Settings that differ for this task, and of `prompt_format` its
            fields that differ.
    """

    name: str
    kind: str
    rows: Sequence[Row]
    digest: str
    score: Mapping[str, Any] = {}

    def with_defaults(self, common: Settings) -> Settings:
        """The common settings, replaced by those that the task sets."""
        return common.with_settings(self.score)


class EncodedTask(NamedTuple):
    """The tokenised rows of a task that are short enough.

    Attributes:
        rows: n rows, in order.
        tables: column -> table of n rows; the columns of a list are named
            "perturbed_answer/0" and so on.
        left_out: ids of the rows that are too long.
        end: [n, L] bool, the tokens of the format's end in the table `answer`.
    """

    rows: Sequence[Row]
    tables: Mapping[str, table.Table]
    left_out: Sequence[Any]
    end: np.ndarray


def make(
    name: str,
    rows: Sequence[Row],
    kind: str = "",
    score: Mapping[str, Any] | None = None,
) -> Task:
    """A task of rows, after checking them.

    Args:
        name: the name of the task.
        rows: as this module describes them; other columns are dropped.
        kind: one of KINDS; if empty, the kind that belongs to the name, or "retain".
        score: fields of Settings that differ for this task.
    Raises:
        ValueError: naming task and row, for no rows, a missing column, a value of
            another type, lists of different lengths, or a duplicate id.
    """
    kind = kind or KIND_OF_NAME.get(name, "retain")
    _checks.one_of(f"The task {name!r}", KINDS, kind=kind)
    for key in score or {}:
        _checks.one_of(f"The task {name!r}'s score", Settings._fields, key=key)
    Settings().with_settings(score or {})
    if not rows:
        raise ValueError(f"The task {name!r} needs at least one row, got none.")
    checked = [_checked_row(name, i, row) for i, row in enumerate(rows)]
    for column in COLUMNS[2:]:
        counts = {_count(row.get(column)) for row in checked}
        if len(counts) > 1:
            raise ValueError(
                f"The task {name!r} needs {column!r} in every row or in none, with the "
                f"same number of values, got {sorted(counts)} values. Split the rows "
                "into several tasks."
            )
    seen: dict[Any, int] = {}
    for i, row in enumerate(checked):
        if row["id"] in seen:
            raise ValueError(
                f"The task {name!r} needs unique ids, but rows {seen[row['id']]} and "
                f"{i} both have {row['id']!r}. Remove one or rename it."
            )
        seen[row["id"]] = i
    return Task(name, kind, checked, official.digest(checked), dict(score or {}))


def overlap(tasks: Mapping[str, Task]) -> list[Any]:
    """Ids (or questions, if the rows had no ids) in both `forget` and `retain`.

    Warns:
        UserWarning: with the ids, as data.overlap.
    """
    if not {"forget", "retain"} <= set(tasks):
        return []
    pair = [tasks[name].rows for name in ("forget", "retain")]
    without_ids = any(
        row["id"] == f"{name}/0" for name in tasks for row in tasks[name].rows[:1]
    )
    if not without_ids:
        return data.overlap(*pair)
    questions = [
        [{"question": q} for q in dict.fromkeys(row["question"] for row in rows)]
        for rows in pair
    ]
    return data.overlap(*questions, by="question")


def encode(
    task: Task, tokenizer: Any, settings: Settings, positions: int | None = None
) -> EncodedTask:
    """Tokenises the rows that are short enough; texts are never truncated.

    Args:
        task: the task.
        tokenizer: a fast tokenizer.
        settings: `prompt_format`, `length` and `new_tokens` are read.
        positions: the model's maximum number of tokens, if it has one.
    Raises:
        ValueError: naming the task, if an answer has no tokens, or every row is too
            long.
    Warns:
        UserWarning: with the number of rows left out, and the longest of them.
    """
    questions = [row["question"] for row in task.rows]
    tables, length, prompt_length = {}, np.zeros(len(questions), int), 0
    for column, answers in _answers(task).items():
        first = column == "answer"
        try:
            made = table.encode(
                tokenizer,
                questions,
                answers,
                prompt_format=settings.prompt_format,
                mark_end=first,
            )
        except ValueError as error:
            raise ValueError(f"The task {task.name!r}, {column}: {error}") from None
        if first:
            end = made.pop("end")
            prompt_length = (made["mask"] & ~made["answer"]).sum(1)
        tables[column] = made
        length = np.maximum(length, made["mask"].sum(1))
    limit = settings.length or positions or int(length.max())
    limit = min(limit, positions or limit)
    fits = length <= limit
    if generates(task, settings) and positions:
        fits &= prompt_length + settings.new_tokens <= positions
    if not fits.all():
        longest = int(np.where(fits, 0, length).argmax())
        message = (
            f"The task {task.name!r}: {(~fits).sum()} of {len(fits)} rows are longer "
            f"than {limit} tokens, or leave no room for {settings.new_tokens} new "
            f"tokens (row {task.rows[longest]['id']!r} has {length[longest]})"
        )
        if not fits.any():
            raise ValueError(f"{message}, and no row is left. Raise length.")
        warnings.warn(f"{message}. They are left out.", stacklevel=2)
    index = np.flatnonzero(fits)
    width = table.rounded_length(length[index].max())
    width = min(width, positions or width)
    return EncodedTask(
        [task.rows[i] for i in index],
        {
            name: {key: x[index, :width] for key, x in each.items()}
            for name, each in tables.items()
        },
        [task.rows[i]["id"] for i in np.flatnonzero(~fits)],
        end[index, :width],
    )


def generates(task: Task, settings: Settings) -> bool:
    """Whether answers are generated and scored by ROUGE."""
    return task.kind != "holdout" and settings.new_tokens > 0


def _answers(task: Task) -> dict[str, list[str]]:
    """Column -> an answer for each row; a list has one numbered column for each."""
    found = {}
    for column in COLUMNS[1:]:
        count = _count(task.rows[0].get(column))
        if count == 1 and isinstance(task.rows[0][column], str):
            found[column] = [row[column] for row in task.rows]
        else:
            for i in range(count):
                found[f"{column}/{i}"] = [row[column][i] for row in task.rows]
    return found


def _checked_row(name: str, number: int, row: Row) -> Row:
    owner = f"The task {name!r}, row {number}:"
    missing = [column for column in COLUMNS[:2] if row.get(column) is None]
    if missing:
        raise ValueError(
            f"{owner} needs {_checks.listed(missing)}, but the row has "
            f"{_checks.listed(row)}. Name the columns of the file in `columns`."
        )
    found = {"id": row.get("id", f"{name}/{number}")}
    found |= {x: row[x] for x in COLUMNS if row.get(x) is not None}
    right, choices = found["answer"], found.get("choices", ())
    if isinstance(right, int) and 0 <= right < len(choices):
        found["answer"] = choices[right]  # MMLU gives the index of the choice
    for column in COLUMNS:
        value = found.get(column, "")
        plural = column in COLUMNS[3:]
        texts = value if plural and value else [value]
        if isinstance(texts, str) or any(map(_checks.not_text, texts)):
            wanted = "a list of texts" if plural else "a text"
            raise ValueError(f"{owner} needs {wanted} in {column!r}, got {value!r}.")
    if "choices" in found and found["answer"] not in found["choices"]:
        raise ValueError(
            f"{owner} needs an answer that is one of its choices, got "
            f"{found['answer']!r} and {found['choices']!r}."
        )
    return found


def _count(value: Any) -> int:
    return 0 if value is None else 1 if isinstance(value, str) else len(value)
