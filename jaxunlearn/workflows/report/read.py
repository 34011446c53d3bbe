# SPDX-License-Identifier: Apache-2.0
"""Evaluation folders as a report reads them, refused unless they can be compared.

Of a folder as jaxunlearn/workflows/evaluation/folder.py describes it, and what may lie beside:

    training.jsonl or metrics.jsonl   an entry a step of the run that made the model
    attacks/NAME.json, card.json      of jaxunlearn/workflows/attack/run.py; or {"attack",
                                      "measure", "chance", "x": {"label", "values"},
                                      "curves": {name: values}} of another attack,
                                      shown number by number if it has no curves
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import tasks

ROLES = ("original", "retrained", "unlearned")
PARTS = ("about.json", "metrics.json")
LOGS = ("training.jsonl", "metrics.jsonl")
TOLD = ("method", "seed", "seconds", "devices", "params_digest", "command")
FREE = ("gradnorm",)  # settings that change no number of another name

Number = Mapping[str, Any]


class Run(NamedTuple):
    """One model's evaluation.

    Attributes:
        folder: where it lies.
        name: what the report calls the model.
        role: one of ROLES.
        about: what about.json holds.
        metrics: {"tasks": task -> name -> number, "overall": name -> number}.
        tokens: task -> rows of {"id", "prompt", "tokens", "logps"}.
        training: entries of the run that made the model; none if it left no log.
        attacks: file's name -> what it holds.
        card: what card.json holds, or None.
    """

    folder: Path
    name: str
    role: str
    about: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    tokens: Mapping[str, Sequence[Mapping[str, Any]]]
    training: Sequence[Mapping[str, Any]]
    attacks: Mapping[str, Mapping[str, Any]]
    card: Mapping[str, Any] | None


def load(folders: Sequence[str | Path]) -> list[Run]:
    """The runs of folders: original, retrained, then unlearned ones as they came.

    Args:
        folders: evaluations, or folders right above some.
    Raises:
        FileNotFoundError: for a folder that is not there or holds no evaluation.
        ValueError: for an evaluation that was cut off, a file that is damaged, two
            models of one name, or evaluations of different data or settings.
    """
    if not folders:
        raise ValueError("A report needs at least one evaluation folder, got none.")
    found: dict[Path, Run] = {}
    for given in folders:
        for folder in _evaluations(Path(given).expanduser()):
            found.setdefault(folder.resolve(), _run(folder))
    runs = sorted(found.values(), key=lambda run: ROLES.index(run.role))
    _names_differ(runs)
    _same_data(runs)
    return runs


def numbers(run: Run, task: str) -> Mapping[str, Number]:
    """The numbers of a task, or of "overall"; empty where it was not asked."""
    if task == "overall":
        return run.metrics["overall"]
    return run.metrics["tasks"].get(task, {})


def value(run: Run, task: str, name: str) -> float | None:
    """One number, None where it was not measured."""
    return numbers(run, task).get(name, {}).get("value")


def _evaluations(folder: Path) -> list[Path]:
    """The folder itself if it is an evaluation, or those right below it."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"A report needs folders of evaluations, but {folder} is not there. Give "
            "the --config.output of jaxunlearn.workflows.evaluation.run."
        )
    if any((folder / part).exists() for part in PARTS):
        return [folder]
    inside = [x for x in sorted(folder.iterdir()) if (x / PARTS[0]).exists()]
    if not inside:
        raise FileNotFoundError(
            f"A report needs {' and '.join(PARTS)} in {folder}, or in folders right "
            "below it, but there are no results. Run python -m jaxunlearn.workflows.evaluation.run "
            f"--config.output={folder} first."
        )
    return inside


def _run(folder: Path) -> Run:
    lacking = [part for part in PARTS if not (folder / part).exists()]
    about = {} if PARTS[0] in lacking else _json(folder / PARTS[0])
    cache = folder / "cache.json"
    stale = cache.exists() and _json(cache).get("metrics") is None
    if lacking or stale:
        command = (
            about.get("command") or "python -m jaxunlearn.workflows.evaluation.run"
        )
        what = f"lacks {' and '.join(lacking)}" if lacking else "was cut off"
        raise ValueError(
            f"The evaluation in {folder} is not finished: it {what}. Run its command "
            f"again: {command}"
        )
    metrics = _json(folder / PARTS[1])
    _has(folder / PARTS[0], about, ("name", "role", "data", "settings", "versions"))
    _has(folder / PARTS[1], metrics, ("tasks", "overall"))
    if about["role"] not in ROLES:
        raise ValueError(
            f"{folder / PARTS[0]} needs a role of {', '.join(ROLES)}, got "
            f"{about['role']!r}. Evaluate again with --config.role."
        )
    shown = {x.stem: _lines(x) for x in sorted((folder / "tokens").glob("*.jsonl"))}
    for task, rows in shown.items():
        for row in rows:
            file = folder / "tokens" / f"{task}.jsonl"
            _has(file, row, ("id", "prompt", "tokens", "logps"))
    logs = [folder / name for name in LOGS if (folder / name).exists()]
    attacks = sorted((folder / "attacks").glob("*.json"))
    card = folder / "card.json"
    return Run(
        folder,
        str(about["name"]),
        about["role"],
        dict.fromkeys(TOLD) | about,
        metrics,
        shown,
        _lines(logs[0]) if logs else [],
        {x.stem: _attack(x) for x in attacks},
        _card(card) if card.exists() else None,
    )


def _attack(file: Path) -> Mapping[str, Any]:
    """An attack's file, its curves as long as its x."""
    found = _json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} needs one JSON object, got {_short(found)}.")
    if "curves" not in found:
        if "sweep" in (found.get("result") or {}):
            _has(file, found["result"]["sweep"], ("hits",))
            _has(file, found, ("unit",))
        return found
    _has(file, found, ("x", "measure"))
    _has(file, found["x"], ("values",))
    count = len(found["x"]["values"])
    for name, curve in found["curves"].items():
        if len(curve) != count:
            raise ValueError(
                f"{file} needs curves of {count} values, as its x has, but {name!r} "
                f"has {len(curve)}. Run the attack again."
            )
    return found


def _card(file: Path) -> Mapping[str, Any]:
    found = _json(file)
    if isinstance(found, list):
        found = {"rows": found}
    _has(file, found, ("rows",))
    if not all(isinstance(row, dict) for row in found["rows"]):
        raise ValueError(f"{file} needs rows that are JSON objects. Make it again.")
    return found


def _names_differ(runs: Sequence[Run]) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        if run.name in seen:
            raise ValueError(
                f"A report needs models of different names, but those of "
                f"{seen[run.name].folder} and {run.folder} are both {run.name!r}. "
                "Evaluate one again with --config.name (nothing is asked twice)."
            )
        seen[run.name] = run


def _same_data(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        shared = [task for task in first.about["data"] if task in run.about["data"]]
        if not shared:
            raise ValueError(
                f"A report compares models on the same tasks, but {first.name!r} was "
                f"asked {_listed(first.about['data'])} and {run.name!r} "
                f"{_listed(run.about['data'])}. Evaluate both on one config's tasks."
            )
        for other in runs[: runs.index(run)]:
            for task, digest in run.about["data"].items():
                theirs = other.about["data"].get(task, digest)
                if theirs != digest:
                    raise ValueError(
                        f"A report compares models on the same rows, but of the task "
                        f"{task!r} {other.name!r} was asked rows with digest "
                        f"{theirs[:16]}... and {run.name!r} rows with digest "
                        f"{digest[:16]}.... Evaluate one of them again on the other's "
                        "data, or make two reports."
                    )
        mine, theirs = (_settings(each, shared) for each in (run, first))
        differ = [
            key
            for key in sorted({*mine, *theirs})
            if key not in FREE and mine.get(key) != theirs.get(key)
        ]
        if differ:
            told = "; ".join(
                f"{key} {theirs.get(key)!r} and {mine.get(key)!r}" for key in differ
            )
            raise ValueError(
                f"A report compares models asked in the same way, but {first.name!r} "
                f"and {run.name!r} differ in settings: {told}. Evaluate one of them "
                "again with the other's."
            )


def _settings(run: Run, shared: Sequence[str]) -> dict[str, Any]:
    """How the shared tasks were asked; a setting newer than the run had its default."""
    usual = folders.plain(tasks.Settings()._asdict())
    own = run.about["settings"].get("tasks", {})
    own = {task: own[task] for task in shared if task in own}
    return usual | run.about["settings"] | {"tasks": own}


def _has(file: Path, found: Any, names: Sequence[str]) -> None:
    lacking = [
        name for name in names if not isinstance(found, dict) or name not in found
    ]
    if lacking:
        raise ValueError(
            f"{file} needs {_listed(names)}, but has no {_listed(lacking)}. It was not "
            "written by this version; evaluate again into an empty folder."
        )


def _json(file: Path) -> Any:
    return _parse(file, _text(file), "")


def _lines(file: Path) -> list[Any]:
    lines = [x for x in enumerate(_text(file).split("\n"), 1) if x[1].strip()]
    return [_parse(file, line, f", line {number}") for number, line in lines]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} needs to be UTF-8 text, but byte {error.start} is not. Make the "
            "file again."
        ) from None


def _parse(file: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}{where} needs to be JSON, but is damaged ({error}). Run what wrote "
            "it again."
        ) from None


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
