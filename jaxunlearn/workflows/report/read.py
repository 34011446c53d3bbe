# SPDX-License-Identifier: Apache-2.0
"""Results as a report reads them, refused unless they can be compared.

A result is an evaluation (workflows/evaluation/folder.py), and optionally the log of
the run that made the model (JSON lines) and its attacks: a folder with card.json and
attacks/NAME.json, which workflows/attack/run.py writes. An attack of another program
may be there too, as {"attack", "measure", "chance", "x": {"label", "values"}, "curves":
{name: values}}; without curves, its numbers are shown in a table.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn import _checks
from jaxunlearn.workflows import records, run_folder
from jaxunlearn.workflows.evaluation import tasks

ROLES = ("original", "retrained", "unlearned")
PARTS = ("about.json", "metrics.json")
OPTIONAL = (
    "method",
    "seed",
    "seconds",
    "devices",
    "compute_dtype",
    "params_digest",
    "command",
)
NOT_COMPARED = ("gradnorm",)  # settings that change no number of another name

Number = Mapping[str, Any]


class Source(NamedTuple):
    """Where the results of one model are.

    Attributes:
        evaluation: the folder of the evaluation.
        log: the log of training, JSON lines, or None.
        attack: the folder of the attacks, or None.
        run: the name of the run, for a model that others may share a name with.
    """

    evaluation: Path
    log: Path | None = None
    attack: Path | None = None
    run: str = ""


class AttackResults(NamedTuple):
    """The attacks on one model.

    Attributes:
        name: what the report calls the model.
        attacks: file's name -> its content.
        card: the content of card.json, or None.
    """

    name: str
    attacks: Mapping[str, Mapping[str, Any]]
    card: Mapping[str, Any] | None


class ModelResults(NamedTuple):
    """The results of one model.

    Attributes:
        folder: the folder of the evaluation.
        name: what the report calls the model.
        role: one of ROLES.
        about: the content of about.json.
        metrics: {"tasks": task -> name -> number, "overall": name -> number}.
        tokens: task -> rows of {"id", "prompt", "tokens", "logps"}.
        training: entries of the log of training; empty if there is no log.
        attack: the attacks, or None.
    """

    folder: Path
    name: str
    role: str
    about: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    tokens: Mapping[str, Sequence[Mapping[str, Any]]]
    training: Sequence[Mapping[str, Any]]
    attack: AttackResults | None


def sources(path: str | Path) -> list[Source]:
    """The results in a folder.

    Args:
        path: the folder of a run, of an evaluation, or of several evaluations. An
            evaluation's folder may also hold training.jsonl, card.json and attacks/.
    Raises:
        FileNotFoundError: if the folder is not there or has no evaluation.
    """
    folder = Path(path).expanduser()
    run = run_folder.at(folder)
    if run.record.is_file():
        return _sources_of_run(run)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"report needs folders of runs or evaluations, got {folder}, which is not "
            "there. Give the --output of `jaxunlearn forget` or `jaxunlearn evaluate`."
        )
    found = [folder] if any((folder / part).exists() for part in PARTS) else []
    found = found or [x for x in sorted(folder.iterdir()) if (x / PARTS[0]).exists()]
    if not found:
        raise FileNotFoundError(
            f"report needs {' and '.join(PARTS)} in {folder} or in folders inside it, "
            f"got a folder without evaluations. Run first: jaxunlearn evaluate MODEL "
            f"--output {folder}"
        )
    return [
        Source(
            x,
            _if_there(x / "training.jsonl"),
            x if (x / "card.json").exists() or (x / "attacks").exists() else None,
        )
        for x in found
    ]


def load(given: Sequence[str | Path | Source]) -> list[ModelResults]:
    """The results of models: original, retrained, then unlearned, as they were given.

    Args:
        given: folders as `sources` takes them, or sources.
    Raises:
        FileNotFoundError: as `sources`.
        ValueError: for an evaluation that is not finished, a damaged file, two models
            of one name, or evaluations of different data or settings.
    """
    if not given:
        raise ValueError(
            "report needs at least one run or evaluation, got none. Name its folder "
            "after the command, as in: jaxunlearn report runs/a"
        )
    found: dict[Path, ModelResults] = {}
    for each in given:
        for source in [each] if isinstance(each, Source) else sources(each):
            place = source.evaluation.resolve()
            if place not in found:
                model = _distinct(_model(source), source.run, found.values())
                found |= {place: model} if model else {}
    models = sorted(found.values(), key=lambda model: ROLES.index(model.role))
    _check_names(models)
    _check_same_data(models)
    return models


def load_attacks(path: str | Path, name: str = "") -> AttackResults:
    """The attacks in a folder.

    Args:
        path: a folder with card.json, attacks/ or both.
        name: what the report calls the model; that of the card, if empty.
    Raises:
        FileNotFoundError: if neither is there. ValueError: for a damaged file.
    """
    folder = Path(path).expanduser()
    files = sorted((folder / "attacks").glob("*.json"))
    card = folder / "card.json"
    if not (files or card.exists()):
        raise FileNotFoundError(
            f"report needs card.json or attacks/ in {folder}, got neither. Run first: "
            f"jaxunlearn attack MODEL --output {folder}"
        )
    found = _card(card) if card.exists() else None
    name = name or str((found or {}).get("about", {}).get("model", folder.name))
    return AttackResults(name, {x.stem: _attack(x) for x in files}, found)


def numbers(model: ModelResults, task: str) -> Mapping[str, Number]:
    """The numbers of a task or of "overall"; empty if it was not evaluated."""
    if task == "overall":
        return model.metrics["overall"]
    return model.metrics["tasks"].get(task, {})


def value(model: ModelResults, task: str, name: str) -> float | None:
    """One number, None if it was not measured."""
    return numbers(model, task).get(name, {}).get("value")


def _sources_of_run(run: run_folder.RunFolder) -> list[Source]:
    found = []
    name = run.path.resolve().name
    for role in ROLES:
        source = Source(run.evaluation(role), run=name)
        if role == "unlearned":
            attack = _if_there(run.attack / "card.json") and run.attack
            source = source._replace(log=_if_there(run.metrics), attack=attack)
        if any((source.evaluation / part).exists() for part in PARTS):
            found.append(source)
    if not found:
        raise FileNotFoundError(
            f"report needs evaluations in {run.path / 'evaluation'}, got none. Run "
            f"first: jaxunlearn evaluate {run.path}"
        )
    return found


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _distinct(model: ModelResults, run: str, others) -> ModelResults | None:
    """The model, None if another run has the same one, renamed if only the name is."""
    for other in others:
        if not run or (other.name, other.role) != (model.name, model.role):
            continue
        keys = ("params_digest", "data", "settings")
        if all(other.about[key] == model.about[key] for key in keys):
            return None
        if model.role != "unlearned":
            return model._replace(name=f"{model.name} of {run}")
    return model


def _model(source: Source) -> ModelResults:
    folder = source.evaluation
    lacking = [part for part in PARTS if not (folder / part).exists()]
    about = {} if PARTS[0] in lacking else _json(folder / PARTS[0])
    cache = folder / "cache.json"
    stale = cache.exists() and _json(cache).get("metrics") is None
    if lacking or stale:
        command = isinstance(about, dict) and about.get("command")
        came = f"{' and '.join(lacking)} missing" if lacking else "an interrupted one"
        raise ValueError(
            f"report needs finished evaluations, but {folder} is not finished: "
            f"{came}. Run its command again: {command or 'jaxunlearn evaluate ...'}"
        )
    metrics = _json(folder / PARTS[1])
    _has(folder / PARTS[0], about, ("name", "role", "data", "settings", "versions"))
    _has(folder / PARTS[1], metrics, ("tasks", "overall"))
    _checks.one_of(str(folder / PARTS[0]), ROLES, role=about["role"])
    tokens = {x.stem: _lines(x) for x in sorted((folder / "tokens").glob("*.jsonl"))}
    for task, rows in tokens.items():
        for row in rows:
            file = folder / "tokens" / f"{task}.jsonl"
            _has(file, row, ("id", "prompt", "tokens", "logps"))
    name = str(about["name"])
    return ModelResults(
        folder,
        name,
        about["role"],
        dict.fromkeys(OPTIONAL) | about,
        metrics,
        tokens,
        _lines(source.log) if source.log else [],
        load_attacks(source.attack, name) if source.attack else None,
    )


def _attack(file: Path) -> Mapping[str, Any]:
    """The content of an attack's file, after checking its curves."""
    found = _json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} needs one JSON object, got {_short(found)}.")
    if "curves" not in found:
        if "sweep" in (found.get("result") or {}):
            _has(file, found["result"]["sweep"], ("hits",))
            _has(file, found, ("job",))
        return found
    _has(file, found, ("x", "measure"))
    _has(file, found["x"], ("values",))
    count = len(found["x"]["values"])
    for name, curve in found["curves"].items():
        if len(curve) != count:
            raise ValueError(
                f"{file} needs curves of {count} values, one for each x, got "
                f"{len(curve)} for {name!r}. Run the attack again."
            )
    return found


def _card(file: Path) -> Mapping[str, Any]:
    found = _json(file)
    if isinstance(found, list):
        found = {"rows": found}
    _has(file, found, ("rows",))
    if not all(isinstance(row, dict) for row in found["rows"]):
        raise ValueError(
            f"{file} needs rows that are JSON objects, got another value. Run the "
            "attack again."
        )
    return found


def _check_names(models: Sequence[ModelResults]) -> None:
    seen: dict[str, ModelResults] = {}
    for model in models:
        if model.name in seen:
            raise ValueError(
                f"report needs models with different names, but those of "
                f"{seen[model.name].folder} and {model.folder} are both "
                f"{model.name!r}. Evaluate one again with --name, or rename the folder "
                "of one run and evaluate it again (finished tasks are kept)."
            )
        seen[model.name] = model


def _check_same_data(models: Sequence[ModelResults]) -> None:
    first = models[0]
    for number, model in enumerate(models[1:], start=1):
        shared = [task for task in first.about["data"] if task in model.about["data"]]
        if not shared:
            raise ValueError(
                f"report needs models evaluated on the same tasks, but {first.name!r} "
                f"has {_checks.listed(first.about['data'])} and {model.name!r} has "
                f"{_checks.listed(model.about['data'])}. Evaluate both on the same "
                "tasks."
            )
        for other in models[:number]:
            for task, here in model.about["data"].items():
                there = other.about["data"].get(task, here)
                if there != here:
                    raise ValueError(
                        f"report needs models evaluated on the same rows, but for the "
                        f"task {task!r} {other.name!r} has rows with digest "
                        f"{there[:16]}... and {model.name!r} has rows with digest "
                        f"{here[:16]}.... Evaluate one of them on the rows of the "
                        "other, or make two reports."
                    )
        ours, theirs = (_settings(each, shared) for each in (model, first))
        differ = [
            key
            for key in sorted({*ours, *theirs})
            if key not in NOT_COMPARED and ours.get(key) != theirs.get(key)
        ]
        if differ:
            listed = "; ".join(
                f"{key} {theirs.get(key)!r} and {ours.get(key)!r}" for key in differ
            )
            raise ValueError(
                f"report needs models evaluated with the same settings, but "
                f"{first.name!r} and {model.name!r} differ in settings: {listed}. "
                "Evaluate one of them with the settings of the other."
            )


def _settings(model: ModelResults, shared: Sequence[str]) -> dict[str, Any]:
    """The settings of the shared tasks; one that is newer than the evaluation has its
    default."""
    common = records.as_json(tasks.Settings.recorded(model.about).by_name())
    of_tasks = model.about["settings"].get("tasks", {})
    of_tasks = {task: of_tasks[task] for task in shared if task in of_tasks}
    return common | {"tasks": of_tasks}


def _has(file: Path, found: Any, names: Sequence[str]) -> None:
    present = found if isinstance(found, dict) else ()
    lacking = [name for name in names if name not in present]
    if lacking:
        raise ValueError(
            f"{file} needs {_checks.listed(names)}, got a file without "
            f"{_checks.listed(lacking)}. Another version wrote it; make it again in an "
            "empty folder."
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
            f"{file} needs UTF-8 text, but byte {error.start} is not. Make the file "
            "again."
        ) from None


def _parse(file: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}{where} needs JSON, but is damaged ({error}). Run the command that "
            "wrote it again."
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
