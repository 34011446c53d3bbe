# SPDX-License-Identifier: Apache-2.0
"""Tasks: named tables of questions, checked before any model is asked.

A row has `question` and `answer`; `paraphrased_answer` and `perturbed_answer` (wrong
ones, a list) where truth ratios are wanted, `choices` (a list that holds the answer)
where it is a choice, and `id` where the file has one. Rows without get "NAME/NUMBER".
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks, data
from jaxunlearn.data import files, table
from jaxunlearn.data.benchmarks import official

KINDS = ("forget", "retain", "options", "holdout")
OF_NAME = {"real_authors": "options", "world_facts": "options"}
OF_NAME |= {kind: kind for kind in KINDS}
BENCHMARKS = ("tofu", "lume", "muse", "wmdp", "mmlu", "rtt_facts")
COLUMNS = ("question", "answer", "paraphrased_answer", "perturbed_answer", "choices")
SETTINGS = ("source", "name", "table", "folder", "check", "path", "columns", "kind")
SETTINGS += ("letters", "shots", "score")
LETTERS = "ABCDEFGHIJ"
LETTERED = {"prompt": "{question}", "new_tokens": 0, "end": False}

Row = Mapping[str, Any]


class Settings(NamedTuple):
    """How rows are put to a model and scored; what is in here changes the numbers.

    Attributes:
        prompt: what stands before the answer; {question} is filled in.
        chat: whether the prompt is what the user says in the tokenizer's own chat
            template, behind which the answer comes without a space.
        system: what the system says there.
        date: the date that the template is given; some write today's without.
        end: whether the tokenizer's end token belongs to every answer.
        length: tokens of question and answer at most; 0 for the model's positions.
        new_tokens: of a generated answer, at most; 0 leaves generation out.
        stops: a generated answer ends before the first of these texts.
        compat: "" or "openunlearning", for that library's epsilon, its dropped last
            token and its floor of extraction strength.
        gradnorm: whether GradNorm, which costs a gradient a row, is among the attacks.
    """

    prompt: str = "{question}"
    end: bool = True
    length: int = 0
    new_tokens: int = 48
    compat: str = ""
    gradnorm: bool = True
    chat: bool = False
    system: str = ""
    date: str = ""
    stops: Sequence[str] = ()


class Task(NamedTuple):
    """One table of questions.

    Attributes:
        name: such as "forget".
        kind: one of KINDS: "forget" (a truth ratio near 1 is best), "retain" (near 0
            is), "options" (so too, and the probability is the share among the wrong
            answers) or "holdout" (rows never seen, for the attacks: nothing is
            generated).
        rows: each with `id`.
        digest: SHA-256 of the rows.
        score: fields of Settings that this task has of its own.
    """

    name: str
    kind: str
    rows: Sequence[Row]
    digest: str
    score: Mapping[str, Any] = {}

    def settings(self, common: Settings) -> Settings:
        """The common settings with the task's own."""
        return common._replace(**self.score)


class Kept(NamedTuple):
    """The rows of a task that fit, as tokens.

    Attributes:
        rows: n of them, in order.
        tables: column -> table of n rows; a list's columns are "perturbed_answer/0"
            and so on.
        left_out: ids of those that do not fit.
    """

    rows: Sequence[Row]
    tables: Mapping[str, table.Table]
    left_out: Sequence[Any]


def make(
    name: str,
    rows: Sequence[Row],
    kind: str = "",
    score: Mapping[str, Any] | None = None,
) -> Task:
    """A task of rows, once they make sense.

    Args:
        name: what it is called.
        rows: as this module describes them; other columns are left out.
        kind: one of KINDS; by the name, or else "retain", if empty.
        score: fields of Settings for this task alone.
    Raises:
        ValueError: naming task and row, for no rows, a missing column, a value of
            another type, lists of different lengths, or an id that comes twice.
    """
    kind = kind or OF_NAME.get(name, "retain")
    _checks.one_of(f"The task {name!r}", KINDS, kind=kind)
    for key in score or {}:
        _checks.one_of(f"The task {name!r}'s score", Settings._fields, key=key)
    if not rows:
        raise ValueError(f"The task {name!r} needs at least one row, got none.")
    kept = [_row(name, i, row) for i, row in enumerate(rows)]
    for column in COLUMNS[2:]:
        counts = {_count(row.get(column)) for row in kept}
        if len(counts) > 1:
            raise ValueError(
                f"The task {name!r} needs {column!r} in every row, as many values in "
                f"each, or in none, got {sorted(counts)} of them. Make tasks of them."
            )
    seen: dict[Any, int] = {}
    for i, row in enumerate(kept):
        if row["id"] in seen:
            raise ValueError(
                f"The task {name!r} needs ids that differ, but rows {seen[row['id']]} "
                f"and {i} both have {row['id']!r}. Take one out or rename it."
            )
        seen[row["id"]] = i
    return Task(name, kind, kept, official.digest(kept), dict(score or {}))


def lettered(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with `choices` as questions for a letter: choices behind letters, a line
    each, and "Answer:", which LETTERED puts as they are."""
    made = []
    for number, row in enumerate(rows):
        choices, right = row.get("choices", ()), row["answer"]
        right = choices.index(right) if right in choices else right
        if not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
            raise ValueError(
                f"A task with letters needs 1 to {len(LETTERS)} choices with the "
                f"answer among them, got {row['answer']!r} and {choices!r} in row "
                f"{number}."
            )
        letters = LETTERS[: len(choices)]
        lines = [f"{x}. {choice}" for x, choice in zip(letters, choices, strict=True)]
        question = "\n".join([row["question"], *lines, "Answer:"])
        own = {"question": question, "answer": letters[right], "choices": list(letters)}
        made.append(({"id": row["id"]} if "id" in row else {}) | own)
    return made


def read(settings: Mapping[str, Any], folder: str = "") -> dict[str, Task]:
    """The tasks that a config names.

    Args:
        settings: task -> `source` "benchmark" with `name`, `table` and optionally
            `folder` and `check`, or "file" with `path`; optionally `columns` (ours ->
            the file's) and `kind`; `letters`, to ask for the letter of a choice as MMLU
            and WMDP are scored; `score`, settings of its own, among them a `prompt`;
            `shots`, a table or file of the same columns, whose rows stand answered
            before each question of that prompt.
        folder: above the benchmarks' own, where a task does not say.
    Raises:
        ValueError, FileNotFoundError: as `make` and the readers of files.
    Warns:
        UserWarning: as `overlap`.
    """
    found = {}
    for name, task in settings.items():
        owner = f"The task {name!r}"
        for key in task:
            _checks.one_of(owner, SETTINGS, key=key)
        renamed = dict(task.get("columns") or {})
        for key in renamed:
            _checks.one_of(f"{owner}'s columns", ("id", *COLUMNS), key=key)
        rows = _rows(owner, task, renamed, folder)
        own = dict(task.get("score") or {})
        own = LETTERED | own if task.get("letters") else own
        if task.get("shots"):
            where = "path" if task["source"] == "file" else "table"
            shots = _rows(owner, {**task, where: task["shots"]}, renamed, folder)
            own["prompt"] = _answered(owner, shots, own) + own["prompt"]
        found[name] = make(name, rows, task.get("kind", ""), own)
    overlap(found)
    return found


def overlap(tasks: Mapping[str, Task]) -> list[Any]:
    """Ids, or questions where ids are our own, in both `forget` and `retain`.

    Warns:
        UserWarning: with the ids, as data.overlap.
    """
    if not {"forget", "retain"} <= set(tasks):
        return []
    pair = [tasks[name].rows for name in ("forget", "retain")]
    own = any(row["id"] == f"{n}/0" for n in tasks for row in tasks[n].rows[:1])
    if not own:
        return data.overlap(*pair)
    once = [
        [{"question": q} for q in dict.fromkeys(row["question"] for row in rows)]
        for rows in pair
    ]
    return data.overlap(*once, by="question")


def fit(
    task: Task, tokenizer: Any, settings: Settings, positions: int | None = None
) -> Kept:
    """The rows whose every text fits, tokenised; none is ever cut.

    Args:
        task: whose rows.
        tokenizer: a fast tokenizer.
        settings: `prompt`, `end`, `length` and `new_tokens` are read.
        positions: of the model, if they are limited.
    Raises:
        ValueError: naming the task, if the tokenizer makes nothing of an answer, or
            no row fits.
    Warns:
        UserWarning: with the number of rows left out, and the longest.
    """
    texts = prompts(task.rows, tokenizer, settings)
    separator = "" if settings.chat else " "
    end = (tokenizer.eos_token or "") if settings.end else ""
    tables, length, start = {}, np.zeros(len(texts), int), 0
    for column, answers in _answers(task).items():
        try:
            # Before there is an end token, so that empty answers are refused.
            bare = table.encode(tokenizer, texts, answers, separator=separator)
        except ValueError as error:
            raise ValueError(f"The task {task.name!r}, {column}: {error}") from None
        if end:
            answers = [x + end for x in answers]
            bare = table.encode(tokenizer, texts, answers, separator=separator)
        tables[column] = bare
        length = np.maximum(length, bare["mask"].sum(1))
        if column == "answer":
            start = (bare["mask"] & ~bare["answer"]).sum(1)
    most = settings.length or positions or int(length.max())
    most = min(most, positions or most)
    fits = length <= most
    if generates(task, settings) and positions:
        fits &= start + settings.new_tokens <= positions
    if not fits.all():
        longest = int(np.where(fits, 0, length).argmax())
        told = (
            f"The task {task.name!r}: {(~fits).sum()} of {len(fits)} rows are longer "
            f"than {most} tokens, or leave no room for {settings.new_tokens} new ones "
            f"(row {task.rows[longest]['id']!r} has {length[longest]})"
        )
        if not fits.any():
            raise ValueError(f"{told}, and no row is left. Raise length.")
        warnings.warn(f"{told}. They are left out.", stacklevel=2)
    index = np.flatnonzero(fits)
    width = table.rounded_length(length[index].max())
    width = min(width, positions or width)
    return Kept(
        [task.rows[i] for i in index],
        {
            name: {key: x[index, :width] for key, x in each.items()}
            for name, each in tables.items()
        },
        [task.rows[i]["id"] for i in np.flatnonzero(~fits)],
    )


def generates(task: Task, settings: Settings) -> bool:
    """Whether answers are generated, for ROUGE."""
    return task.kind != "holdout" and settings.new_tokens > 0


def prompts(rows: Sequence[Row], tokenizer: Any, settings: Settings) -> list[str]:
    """What the model reads before each answer.

    Raises:
        ValueError: for a chat with a tokenizer that has no template.
    """
    texts = [settings.prompt.replace("{question}", row["question"]) for row in rows]
    if not settings.chat:
        return texts
    date = {"date_string": settings.date} if settings.date else {}
    return data.chat_prompts(tokenizer, texts, system=settings.system, **date)


def _answers(task: Task) -> dict[str, list[str]]:
    """Column -> an answer a row; those of a list are numbered."""
    found = {}
    for column in COLUMNS[1:]:
        count = _count(task.rows[0].get(column))
        if count == 1 and isinstance(task.rows[0][column], str):
            found[column] = [row[column] for row in task.rows]
        else:
            for i in range(count):
                found[f"{column}/{i}"] = [row[column][i] for row in task.rows]
    return found


def _answered(owner, shots, own) -> str:
    """Questions and answers, each followed by an empty line."""
    _checks.has_keys(owner, "in its score", ["prompt"], own, "Shots need a wording.")
    return "".join(
        f"{own['prompt'].replace('{question}', shot['question'])} {shot['answer']}\n\n"
        for shot in shots
    )


def _rows(owner, task, renamed, folder):
    """A file's or a table's rows under our names, lettered if the task says so."""
    rows = _read_rows(owner, task, renamed, folder)
    fix = "Name the columns of the file in `columns`."
    _checks.has_keys(owner, "columns", renamed.values(), rows[0], fix)
    for ours, theirs in renamed.items():
        rows = [{**row, ours: row.get(theirs)} for row in rows]
    return lettered(rows) if task.get("letters") else rows


def _read_rows(owner, task, renamed, folder):
    _checks.one_of(owner, ("benchmark", "file"), source=task.get("source"))
    if task["source"] == "file":
        wanted = [renamed.get(name, name) for name in ("question", "answer")]
        return files.read_rows(task.get("path", ""), wanted)
    _checks.one_of(owner, BENCHMARKS, name=task.get("name"))
    return getattr(data, task["name"]).read(
        task.get("table", ""),
        task.get("folder") or folder or None,
        check=task.get("check", True),
    )


def _row(name: str, number: int, row: Row) -> Row:
    owner = f"The task {name!r}, row {number}:"
    missing = [column for column in COLUMNS[:2] if row.get(column) is None]
    if missing:
        raise ValueError(
            f"{owner} needs {_checks.listed(missing)}, but the row has "
            f"{_checks.listed(row)}. Name the columns of the file in `columns`."
        )
    kept = {"id": row.get("id", f"{name}/{number}")}
    kept |= {x: row[x] for x in COLUMNS if row.get(x) is not None}
    right, choices = kept["answer"], kept.get("choices", ())
    if isinstance(right, int) and 0 <= right < len(choices):
        kept["answer"] = choices[right]  # by its number, as MMLU has it
    for column in COLUMNS:
        value = kept.get(column, "")
        plural = column in COLUMNS[3:]
        texts = value if plural and value else [value]
        if not all(isinstance(x, str) for x in texts) or isinstance(texts, str):
            kind = "a list of texts" if plural else "a text"
            raise ValueError(f"{owner} needs {kind} in {column!r}, got {value!r}.")
    if "choices" in kept and kept["answer"] not in kept["choices"]:
        raise ValueError(
            f"{owner} needs an answer that is one of its choices, got "
            f"{kept['answer']!r} and {kept['choices']!r}."
        )
    return kept


def _count(value: Any) -> int:
    return 0 if value is None else 1 if isinstance(value, str) else len(value)
