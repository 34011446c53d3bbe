# SPDX-License-Identifier: Apache-2.0
"""The folder of one evaluation: what lies in it, whole, and what it was made of.

    about.json          who was asked what, by which versions and command
    metrics.json        numbers with intervals
    rows/TASK.jsonl     a line a row, as jaxunlearn/workflows/evaluation/values.py says
    tokens/TASK.jsonl   tokens of the first rows to forget, with their log-probabilities
    cache.json          task -> the digest of all that its rows depend on, and theirs

A file is replaced whole. NaN and infinity are written as null.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import trees
from jaxunlearn.io import log
from jaxunlearn.typing import Params
from jaxunlearn.workflows.evaluation import tasks

VERSION = 1  # of the rows; one more whenever the code would give other values


class Entry(NamedTuple):
    """What cache.json says of a task.

    Attributes:
        key: digest of all that the rows depend on.
        digest: of the file of rows.
        left_out: ids of rows that were too long.
        seconds: that the rows took.
    """

    key: str
    digest: str
    left_out: Sequence[Any]
    seconds: float


class Retained(NamedTuple):
    """The evaluation of the retrained model.

    Attributes:
        folder: where it was read.
        rows: task -> rows, of the tasks both have.
        key: digest of what was read.
    """

    folder: Path
    rows: Mapping[str, list[dict[str, Any]]]
    key: str


def params_digest(params: Params) -> str:
    """SHA-256 over paths, dtypes, shapes and bits of all leaves."""
    total = hashlib.sha256()
    for path, leaf in sorted(trees.paths(params).items()):
        if leaf is None:
            continue
        array = np.ascontiguousarray(np.asarray(leaf))
        total.update(f"{path} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8))
    return total.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_tokenizer(tokenizer: Any, place: str | os.PathLike) -> None:
    """Raises ValueError, naming where a model lies, if no tokenizer came with it."""
    if tokenizer is None:
        raise ValueError(
            f"Asking a model needs its tokenizer, got {place} without one. Save it "
            "with hf.save(..., tokenizer=tokenizer) or hf.save_gguf, or copy the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) into the "
            "folder. Beside a .gguf file they are not read."
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """Of a fast tokenizer's rules and its end token."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # set by whoever used it last
        rules.pop(name, None)
    return digest([rules, tokenizer.eos_token])


def entries(folder: Path) -> dict[str, Entry]:
    """What is there of each task."""
    file = folder / "cache.json"
    if not file.exists():
        return {}
    read = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return {name: Entry(**each) for name, each in read.items()}


def summary_key(folder: Path) -> str | None:
    """What metrics.json was made of, where it is there."""
    files = [folder / name for name in ("cache.json", "metrics.json", "about.json")]
    if not all(file.exists() for file in files):
        return None
    return json.loads(files[0].read_text(encoding="utf-8"))["metrics"]


def write_cache(folder: Path, found: Mapping[str, Entry], metrics: str | None) -> None:
    """Notes what the files of the folder were made of."""
    each = {name: entry._asdict() for name, entry in found.items()}
    write(folder / "cache.json", {"tasks": each, "metrics": metrics})


def valid(folder: Path, task: str, entry: Entry | None, key: str) -> bool:
    """Whether the rows of a task are there, of this key, and as they were written."""
    file = folder / "rows" / f"{task}.jsonl"
    if entry is None or entry.key != key or not file.exists():
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == entry.digest


def rows(folder: Path, task: str) -> list[dict[str, Any]]:
    """The rows of a task."""
    text = (folder / "rows" / f"{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def write_rows(
    folder: Path, task: str, found: Sequence[Any], shown: Sequence[Any]
) -> str:
    """Writes rows and tokens; the digest of the rows' file."""
    if shown:
        replace(folder / "tokens" / f"{task}.jsonl", _lines(shown))
    else:
        (folder / "tokens" / f"{task}.jsonl").unlink(missing_ok=True)
    text = _lines(found)
    replace(folder / "rows" / f"{task}.jsonl", text)
    return hashlib.sha256(text.encode()).hexdigest()


def remove(folder: Path, task: str) -> None:
    """Removes the files of a task that is no longer asked."""
    for kind in ("rows", "tokens"):
        (folder / kind / f"{task}.jsonl").unlink(missing_ok=True)


def retained(
    folder: str | os.PathLike,
    asked: Mapping[str, tasks.Task],
    settings: tasks.Settings,
) -> Retained:
    """The rows of the retrained model, once they are known to be of the same data.

    Args:
        folder: its evaluation.
        asked: this evaluation's tasks.
        settings: and how they are asked.
    Raises:
        FileNotFoundError: if there is no finished evaluation.
        ValueError: naming both digests, if it was of other data, or other settings, or
            lacks the rows to forget.
    """
    folder = Path(folder).expanduser()
    if summary_key(folder) is None:
        raise FileNotFoundError(
            f"The retrained model's evaluation needs about.json, metrics.json and "
            f"cache.json in {folder}, got not all of them. Evaluate that model first."
        )
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    shared = [name for name in ("forget", "holdout") if name in asked]
    for name in shared:
        own, other = asked[name].digest, about["data"].get(name)
        if own != other:
            came = f"digest {other[:16]}..." if other else "no such task"
            raise ValueError(
                f"The evaluation in {folder} ({about['name']}) belongs to other data: "
                f"for the task {name!r} it has {came}, this one has digest "
                f"{own[:16]}.... Evaluate the retrained model on the same rows."
            )
    for name in shared:
        here = plain(asked[name].settings(settings)._asdict())
        there = _settings(about, name)
        differ = [x for x in here if here[x] != there[x]]
        differ = [x for x in differ if x not in ("new_tokens", "stops", "gradnorm")]
        if not differ:
            continue
        told = "; ".join(f"{x} {there[x]!r} there, {here[x]!r} here" for x in differ)
        raise ValueError(
            f"The evaluation in {folder} ({about['name']}) was made with other "
            f"settings: {told}. Evaluate the retrained model anew."
        )
    found = entries(folder)
    return Retained(
        folder,
        {name: rows(folder, name) for name in shared},
        digest([(name, found[name].digest) for name in shared]),
    )


def plain(value: Any) -> Any:
    """What a file gives back of a value."""
    return json.loads(json.dumps(value))


def _settings(about: Mapping[str, Any], task: str) -> dict[str, Any]:
    """How an evaluation asked a task; a setting newer than it had its default."""
    told = dict(about["settings"])
    own = told.pop("tasks", {}).get(task, {})
    return plain(tasks.Settings._field_defaults) | told | own


def same_rows(retained: Retained, task: str, own: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, naming ids, unless both have the same rows of a task."""
    pair = [[row["id"] for row in each] for each in (own, retained.rows[task])]
    if pair[0] != pair[1]:
        apart = [x for x in (*pair[0], *pair[1]) if (x in pair[0]) != (x in pair[1])]
        raise ValueError(
            f"The evaluation in {retained.folder} has other rows of the task "
            f"{task!r}: {len(pair[1])} there, {len(pair[0])} here, apart by "
            f"{apart[:8]}. Were other rows too long? Give both one length."
        )


def read(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    text = json.dumps(log.plain(value), ensure_ascii=False, indent=1)
    replace(path, text + "\n")


def _lines(found: Sequence[Any]) -> str:
    return "".join(
        json.dumps(log.plain(row), ensure_ascii=False) + "\n" for row in found
    )


def replace(path: Path, text: str) -> None:
    """Writes text, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
