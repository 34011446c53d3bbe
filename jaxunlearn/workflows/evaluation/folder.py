# SPDX-License-Identifier: Apache-2.0
"""The folder of one evaluation.

about.json          which model was evaluated, by which versions and command
metrics.json        numbers with intervals
rows/TASK.jsonl     one line for each row, see workflows/evaluation/values.py
tokens/TASK.jsonl   the tokens of the first forget rows with their log-probabilities
cache.json          for each task the key of its rows and the digest of their file
training.jsonl      optional: the log of the run that made the model, for the report
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.workflows import records
from jaxunlearn.workflows.evaluation import tasks as task_room

VERSION = 2  # of the rows; raise it when the code computes other values
# Settings that change no number that is compared with the retrained model's.
NOT_COMPARED = ("new_tokens", "stops", "gradnorm")


class CacheEntry(NamedTuple):
    """What cache.json holds for a task.

    Attributes:
        key: digest of everything that the rows depend on.
        digest: of the file of rows.
        left_out: ids of the rows that were too long.
        seconds: the time that the rows took.
    """

    key: str
    digest: str
    left_out: Sequence[Any]
    seconds: float


class Reference(NamedTuple):
    """The evaluation of the retrained model.

    Attributes:
        folder: the folder it was read from.
        rows: task -> rows, for the tasks that both evaluations have.
        key: digest of what was read.
    """

    folder: Path
    rows: Mapping[str, list[dict[str, Any]]]
    key: str


def read_cache(folder: Path) -> dict[str, CacheEntry]:
    """The cache entry of each task that the folder has."""
    file = folder / "cache.json"
    if not file.exists():
        return {}
    found = records.read(file)["tasks"]
    return {name: CacheEntry(**entry) for name, entry in found.items()}


def write_cache(
    folder: Path, entries: Mapping[str, CacheEntry], metrics: str | None
) -> None:
    """Writes cache.json; `metrics` is the key of metrics.json, None if it is stale."""
    found = {name: entry._asdict() for name, entry in entries.items()}
    records.write(folder / "cache.json", {"tasks": found, "metrics": metrics})


def metrics_key(folder: Path) -> str | None:
    """The key of metrics.json; None if the evaluation is not finished."""
    files = [folder / name for name in ("cache.json", "metrics.json", "about.json")]
    if not all(file.exists() for file in files):
        return None
    return records.read(files[0])["metrics"]


def rows_are_current(
    folder: Path, task: str, entry: CacheEntry | None, key: str
) -> bool:
    """Whether the rows of a task have this key and are as they were written."""
    file = folder / "rows" / f"{task}.jsonl"
    if entry is None or entry.key != key or not file.exists():
        return False
    return records.file_digest(file) == entry.digest


def read_rows(folder: Path, task: str) -> list[dict[str, Any]]:
    """The rows of a task."""
    return records.read_lines(folder / "rows" / f"{task}.jsonl")


def write_rows(
    folder: Path, task: str, rows: Sequence[Any], tokens: Sequence[Any]
) -> str:
    """Writes the rows and tokens of a task; returns the digest of the rows' file."""
    file = folder / "tokens" / f"{task}.jsonl"
    if tokens:
        records.write_lines(file, tokens)
    else:
        file.unlink(missing_ok=True)
    return records.write_lines(folder / "rows" / f"{task}.jsonl", rows)


def remove_task(folder: Path, task: str) -> None:
    """Removes the files of a task."""
    for part in ("rows", "tokens"):
        (folder / part / f"{task}.jsonl").unlink(missing_ok=True)


def is_evaluation(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an evaluation, finished or not."""
    folder = Path(folder).expanduser()
    return any((folder / name).exists() for name in ("about.json", "cache.json"))


def read_reference(
    folder: str | os.PathLike,
    tasks: Mapping[str, task_room.Task],
    settings: task_room.Settings,
) -> Reference:
    """The rows of the retrained model's evaluation, if it can be compared.

    Args:
        folder: its evaluation.
        tasks: the tasks of this evaluation.
        settings: the settings of this evaluation.
    Raises:
        FileNotFoundError: if the folder has no finished evaluation.
        ValueError: naming both digests or settings, if it has other data, other
            settings, or no forget rows.
    """
    folder = Path(folder).expanduser()
    if metrics_key(folder) is None:
        raise FileNotFoundError(
            f"The retrained model's evaluation needs about.json, metrics.json and "
            f"cache.json, got {folder} without all of them. Evaluate that model first."
        )
    about = records.read(folder / "about.json")
    shared = [name for name in ("forget", "holdout") if name in tasks]
    for name in shared:
        here, there = tasks[name].digest, about["data"].get(name)
        if here != there:
            came = f"digest {there[:16]}..." if there else "no such task"
            raise ValueError(
                f"The retrained model's evaluation needs the same rows, but "
                f"{folder} ({about['name']}) has {came} for the task {name!r}, and "
                f"this evaluation has digest {here[:16]}.... Evaluate the retrained "
                "model on the same rows."
            )
    for name in shared:
        here = records.as_json(tasks[name].with_defaults(settings).by_name())
        there = task_room.Settings.recorded(about, name).by_name()
        there = records.as_json(there)
        differ = [x for x in here if x not in NOT_COMPARED and here[x] != there[x]]
        if differ:
            listed = "; ".join(
                f"{x} {there[x]!r} there, {here[x]!r} here" for x in differ
            )
            raise ValueError(
                f"The retrained model's evaluation needs the same settings, but "
                f"{folder} ({about['name']}) has other settings: {listed}. Evaluate "
                "the retrained model again."
            )
    entries = read_cache(folder)
    return Reference(
        folder,
        {name: read_rows(folder, name) for name in shared},
        records.digest([(name, entries[name].digest) for name in shared]),
    )


def check_same_rows(
    reference: Reference, task: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ValueError, naming ids, unless both evaluations have the same rows."""
    here = [row["id"] for row in rows]
    there = [row["id"] for row in reference.rows[task]]
    if here != there:
        differ = [x for x in (*here, *there) if (x in here) != (x in there)]
        raise ValueError(
            f"The retrained model's evaluation needs the same rows, but "
            f"{reference.folder} has {len(there)} rows of the task {task!r} and this "
            f"evaluation has {len(here)}; ids in one only: {differ[:8]}. Were other "
            "rows too long? Use the same length for both."
        )
