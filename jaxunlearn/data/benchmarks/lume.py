# SPDX-License-Identifier: Apache-2.0
"""LUME (SemEval-2025 Task 4): fictitious stories, fictitious people, real people.

    forget, retain = (lume.read(name, folder) for name in ("forget", "retain"))
    questions = lume.read("forget", folder, kinds=("qa",), tasks=("Task2",))

An id is `<document><kind><number>`. Kind `sc` is a sentence completion and kind `qa` a
question about the document. The document is a UUID, in literal double quotes in Task1
and without quotes in Task2, or the number of a page in Task3. Task3 is about real
people.
"""

import os
import re
from collections.abc import Collection
from typing import NamedTuple

from jaxunlearn import _checks
from jaxunlearn.data.benchmarks import official

KINDS = ("sc", "qa")
TASKS = ("Task1", "Task2", "Task3")
_ID = re.compile(r'"?(.+?)"?(sc|qa)(\d+)')
_COLUMNS = {"id": "text", "input": "text", "output": "text", "task": "text"}
_RAW = (
    "https://raw.githubusercontent.com/amazon-science/lume-llm-unlearning/"
    "b2fa8f9c567715f1e2c6d442213f33b2e9a28fe6/data/{}.jsonl"
)

BENCHMARK = official.Benchmark(
    name="lume",
    tables={
        name: official.Table((f"{name}.jsonl",), _COLUMNS, rows, url=_RAW.format(name))
        for name, rows in (("forget", 2732), ("retain", 2734))
    },
    home="https://github.com/amazon-science/lume-llm-unlearning",
    licence="Apache-2.0; the texts of Task3 are Wikipedia's, CC BY-SA",
    citation="A. Ramakrishna et al. LUME: LLM Unlearning with Multitask Evaluations. "
    "2025. https://arxiv.org/abs/2502.15097",
)


class Id(NamedTuple):
    """The parts of a row's id; `document` is without its quotes."""

    document: str
    kind: str
    number: int


def parse_id(text: str) -> Id:
    """The parts of an id. Raises ValueError if the text is not an id of LUME."""
    found = _ID.fullmatch(text)
    if not found:
        raise ValueError(
            f"lume needs ids such as '1234567qa0', <document><sc or qa><number>, got "
            f"{text!r}. Use the official file."
        )
    return Id(found[1], found[2], int(found[3]))


def read(
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    tasks: Collection[str] = TASKS,
    kinds: Collection[str] = KINDS,
    check: bool = True,
    download: bool = False,
) -> official.Rows:
    """Rows with id, input, output and task, in the order of the file.

    Args:
        table: "forget" or "retain".
        folder, check, download: as for official.Benchmark.read.
        tasks, kinds: the rows to return; all by default.
    Raises:
        ValueError: as Benchmark.read; also for an invalid id, an unknown task, or if no
            row is of these tasks and kinds.
    """
    if isinstance(tasks, str) or isinstance(kinds, str):
        raise TypeError("lume.read needs tasks and kinds as tuples, got one text.")
    for task in tasks:
        _checks.one_of("lume.read", TASKS, tasks=task)
    for kind in kinds:
        _checks.one_of("lume.read", KINDS, kinds=kind)
    rows = BENCHMARK.read(table, folder, check=check, download=download)
    for row in rows:
        _checks.one_of(f"lume row {row['id']!r}", TASKS, task=row["task"])
    selected = [
        row
        for row in rows
        if parse_id(row["id"]).kind in kinds and row["task"] in tasks
    ]
    if not selected:
        raise ValueError(
            f"lume {table} needs a row of tasks {_checks.listed(tasks)} and kinds "
            f"{_checks.listed(kinds)}, got none. Select more."
        )
    return selected
