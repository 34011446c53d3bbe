# SPDX-License-Identifier: Apache-2.0
"""A few documents of LUME, and questions of MMLU, as rows of the small world."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxunlearn.data.benchmarks import lume, mmlu

Row = Mapping[str, Any]


def rows(
    folder: Path, *, documents: int, words: int, max_words: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows by their use.

    Args:
        folder: of the data sets, with lume/ and mmlu/.
        documents: of each task in each of forget, retain and holdout.
        words: of a completion's input; the last ones are used.
        max_words: of input and output together, in every row of a document.
    Returns:
        `forget` and `retain`, all rows of the first documents that are short enough;
        `holdout`, completions of further documents of the forget file, which no model
        trains on; `other`, a question of each of MMLU's subjects, the shortest whose
        choices differ, where that is short enough. Rows have `author` (the document or
        subject), `question` and `answer`; LUME's `task` and `kind` too, MMLU's three
        wrong choices as `perturbed_answer`.
    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: if a task has too few documents that are short enough.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, parts in (("forget", ("forget", "holdout")), ("retain", ("retain",))):
        by_task: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in lume.read(name, folder):
            made = _row(row, words)
            by_document = by_task.setdefault(row["task"], {})
            by_document.setdefault(made["author"], []).append(made)
        for task, by_document in by_task.items():
            short = [
                each
                for each in by_document.values()
                if {row["kind"] for row in each} == set(lume.KINDS)
                and max(map(_words, each)) <= max_words
            ]
            needed = documents * len(parts)
            if len(short) < needed:
                raise ValueError(
                    f"The small world needs {needed} documents of {task} of at most "
                    f"{max_words} words a row in {name}, got {len(short)}. Raise "
                    "max_words."
                )
            for index, part in enumerate(parts):
                chosen = short[index * documents : (index + 1) * documents]
                found.setdefault(part, []).extend(row for x in chosen for row in x)
    found["holdout"] = [row for row in found["holdout"] if row["kind"] == "sc"]
    found["other"] = _subjects(mmlu.read("test", folder), max_words)
    return found


def _row(row: Row, words: int) -> dict[str, Any]:
    document, kind, _ = lume.parse_id(row["id"])
    text = row["input"].strip()
    if kind == "sc":
        text = " ".join(text.split()[-words:])
    answer = row["output"].strip()
    about = {"task": row["task"], "kind": kind}
    return {"author": document, "question": text, "answer": answer, **about}


def _words(row: Row) -> int:
    return len(f"{row['question']} {row['answer']}".split())


def _subjects(rows: Sequence[Row], max_words: int) -> list[dict[str, Any]]:
    shortest: dict[str, Row] = {}
    for row in rows:
        good = len(set(row["choices"])) == 4 and all(map(str.strip, row["choices"]))
        if good and row["question"].strip() and _size(row) <= max_words:
            best = shortest.setdefault(row["subject"], row)
            if _size(row) < _size(best):
                shortest[row["subject"]] = row
    return [
        {
            "author": subject,
            "question": row["question"].strip(),
            "answer": row["choices"][row["answer"]].strip(),
            "perturbed_answer": [
                choice.strip()
                for i, choice in enumerate(row["choices"])
                if i != row["answer"]
            ],
        }
        for subject, row in shortest.items()
    ]


def _size(row: Row) -> int:
    return len(row["question"].split()) + max(len(x.split()) for x in row["choices"])
