# SPDX-License-Identifier: Apache-2.0
"""Tasks from benchmarks and files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxunlearn import _checks, _text, data
from jaxunlearn.data import files
from jaxunlearn.workflows.evaluation.tasks import COLUMNS, Row, Task, make, overlap

BENCHMARKS = ("tofu", "lume", "muse", "wmdp", "mmlu", "rtt_facts")
TASK_KEYS = ("source", "name", "table", "folder", "check", "path", "columns", "kind")
TASK_KEYS += ("letters", "shots", "score")
LETTERS = "ABCDEFGHIJ"
LETTER_SETTINGS = {"prompt_format": {"prompt": "{question}", "end": ""}}
LETTER_SETTINGS |= {"new_tokens": 0}


def read(settings: Mapping[str, Any], folder: str = "") -> dict[str, Task]:
    """The tasks that a config describes.

    Args:
        settings: task -> a dict with
            `source`: "benchmark" (with `name`, `table` and optionally `folder` and
            `check`) or "file" (with `path`);
            `columns`: optional, our column names -> those of the file;
            `kind`: optional, one of KINDS;
            `letters`: optional, True to score the letter of a choice, as MMLU and WMDP
            are scored;
            `score`: optional, fields of Settings that differ for this task;
            `shots`: optional, a table or file with the same columns; its questions and
            answers are put before every question.
        folder: the parent folder of the benchmarks, where a task names none.
    Raises:
        ValueError, FileNotFoundError: as `make` and the readers of files.
    Warns:
        UserWarning: as `overlap`.
    """
    found = {}
    for name, task in settings.items():
        owner = f"The task {name!r}"
        for key in task:
            _checks.one_of(owner, TASK_KEYS, key=key)
        renamed = dict(task.get("columns") or {})
        for key in renamed:
            _checks.one_of(f"{owner}'s columns", ("id", *COLUMNS), key=key)
        rows = _rows(owner, task, renamed, folder)
        score = dict(task.get("score") or {})
        score = LETTER_SETTINGS | score if task.get("letters") else score
        if task.get("shots"):
            where = "path" if task["source"] == "file" else "table"
            shots = _rows(owner, {**task, where: task["shots"]}, renamed, folder)
            score["prompt_format"] = _with_shots(owner, shots, score)
        found[name] = make(name, rows, task.get("kind", ""), score)
    overlap(found)
    return found


def read_file(
    path: str | os.PathLike, *, question: str = "", answer: str = "answer", **more: str
) -> list[dict[str, Any]]:
    """The rows of a file, with `question` and `answer`.

    Args:
        path: a file as data.files.read_rows takes it.
        question: the file's column; if empty, `question`, or else `prompt`.
        answer: the file's column.
        more: our column -> the file's, for optional columns.
    Raises:
        FileNotFoundError, ValueError: as data.files.read_rows, for a file that is not
            there, has no rows or lacks a column.
    """
    rows = files.read_rows(path, tuple(filter(None, (question, answer))))
    if not question:
        question = "question" if "question" in rows[0] else "prompt"
        rows = files.read_rows(path, (question, answer))
    files.texts(rows, question)
    if more.get("choices", "choices") not in rows[0]:  # else it may be an index
        files.texts(rows, answer)
    renamed = {"question": question, "answer": answer, **more}
    return [
        row | {ours: row[theirs] for ours, theirs in renamed.items() if theirs in row}
        for row in rows
    ]


def read_text_file(path: str | os.PathLike, column: str = "text") -> list[Row]:
    """Running text as rows: the first half of each text is the prompt.

    A model that memorised a text continues its first half; a text of fewer than two
    words (two characters, in scripts without spaces) has none and is left out.

    Args:
        path: a file as data.files.read_texts or read_rows takes it.
        column: the file's column.
    """
    if column == "text":
        rows = files.read_texts(path)
    else:
        rows = files.read_rows(path, (column,))
    found = []
    for text in files.texts(rows, column):
        question, answer = _text.halves(text)
        if question:
            found.append({"question": question, "answer": answer})
    return found


def lettered(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with `choices` as questions whose answer is a letter, as MMLU is scored.

    The question is followed by the choices, each on a line behind its letter, and
    "Answer:". LETTER_SETTINGS are the settings for such rows.
    """
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
        fields = dict(question=question, answer=letters[right], choices=list(letters))
        made.append(({"id": row["id"]} if "id" in row else {}) | fields)
    return made


def _with_shots(owner, shots, score) -> dict[str, Any]:
    """The task's format with questions and their answers before its wording, each
    followed by an empty line."""
    given = score.get("prompt_format", {})
    fix = "Shots need a wording."
    _checks.has_keys(owner, "in its prompt_format", ["prompt"], given, fix)
    wording = data.PromptFormat(prompt=given["prompt"])
    text = "".join(
        f"{wording.worded(shot['question'])} {shot['answer']}\n\n" for shot in shots
    )
    return dict(given) | {"prompt": text + wording.prompt}


def _rows(owner, task, renamed, folder):
    """The rows of a file or table with our column names, as letters if wanted."""
    rows = _read_rows(owner, task, renamed, folder)
    fix = "Name the columns of the file in `columns`."
    _checks.has_keys(owner, "columns", renamed.values(), rows[0], fix)
    for ours, theirs in renamed.items():
        rows = [{**row, ours: row.get(theirs)} for row in rows]
    return lettered(rows) if task.get("letters") else rows


def _read_rows(owner, task, renamed, folder):
    _checks.one_of(owner, ("benchmark", "file"), source=task.get("source"))
    if task["source"] == "file":
        return read_file(task.get("path", ""), **renamed)
    _checks.one_of(owner, BENCHMARKS, name=task.get("name"))
    return getattr(data, task["name"]).read(
        task.get("table", ""),
        task.get("folder") or folder or None,
        check=task.get("check", True),
    )
