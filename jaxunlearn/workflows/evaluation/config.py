# SPDX-License-Identifier: Apache-2.0
"""Evaluation from a config: a dict with the keys of `defaults`."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxunlearn import _checks, data, sharding
from jaxunlearn.workflows import run_folder
from jaxunlearn.workflows.evaluation import benchmarks, of_run, sources, tasks, values
from jaxunlearn.workflows.evaluation import run as evaluation

SCORE = tuple(name for name in tasks.Settings._fields if name != "prompt_format")


def defaults() -> dict[str, Any]:
    """Every setting of an evaluation with its default."""
    return {
        "model": "",  # a run's folder, or a model as loading.load takes it
        "output": "",  # not for a run's folder
        "retrained": "",  # the retrained model or the folder of its evaluation
        "name": "",  # what a report calls the model; the output's name if empty
        "role": "unlearned",  # or "original" or "retrained"
        "method": "",
        "seed": -1,  # of unlearning, recorded in about.json; -1 for none
        "folder": "",  # the parent of tofu/ and so on; JAXUNLEARN_DATA if empty
        "tasks": {},  # as sources.read takes them
        "benchmarks": (),  # names, as benchmarks.tasks takes them
        "judges": {},  # name -> "module:function", see evaluation.Options
        "prompt_format": data.PromptFormat().as_dict(),
        "score": {k: x for k, x in tasks.Settings()._asdict().items() if k in SCORE},
        "batch_size": 32,
        "num_resamples": 1000,  # of the bootstrap
        "dtype": "float32",
        "compute_dtype": "auto",  # the faster of bfloat16 and float32
        "mesh": dict.fromkeys(sharding.AXES, 1),
    }


def evaluate(
    config: Mapping[str, Any],
    *,
    command: str = "",
    log_fn: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Evaluates the model or the run that a config names.

    Args:
        config: keys of `defaults`; those that are missing have their defaults. For a
            run, missing keys of `prompt_format` are the run's.
        command: the command line, recorded in about.json.
        log_fn: called with one line for each task.
    Returns:
        role -> the content of metrics.json.
    Raises:
        ValueError, FileNotFoundError: for a config, rows or a model that cannot be
            used.
    """
    c = _complete(config)
    record = None
    if run_folder.at(c["model"]).record.is_file():
        run, record = run_folder.finished(c["model"])
    elif not c["output"]:
        raise ValueError(
            f"evaluate needs an output folder for a model that is not a run's folder, "
            f"got {c['model']}. Pass --output FOLDER."
        )
    eval_tasks = _tasks(c, record)
    prompt_format = data.PromptFormat() if record is None else record.prompt_format
    given = config.get("prompt_format", {})
    prompt_format = prompt_format.with_settings(given)
    prompt_format.check_chat("The evaluation's prompt_format", given)
    for name, task in c["tasks"].items():
        given = (task.get("score") or {}).get("prompt_format", {})
        prompt_format.with_settings(given).check_chat(f"The task {name!r}", given)
    options = evaluation.Options(
        settings=tasks.Settings(prompt_format, **c["score"]),
        judges={name: _judge(name, where) for name, where in c["judges"].items()},
        batch_size=c["batch_size"],
        num_resamples=c["num_resamples"],
        mesh=_mesh(c["mesh"]),
        dtype=c["dtype"],
        compute_dtype=c["compute_dtype"],
        command=command,
        log_fn=log_fn,
    )
    if record is not None:
        return of_run.evaluate_run(
            run, record, eval_tasks, options, retrained=c["retrained"]
        )
    return {
        c["role"]: evaluation.evaluate_path(
            c["model"],
            eval_tasks,
            c["output"],
            options,
            name=c["name"],
            role=c["role"],
            method=c["method"] or None,
            seed=None if c["seed"] < 0 else c["seed"],
            retrained=c["retrained"] or None,
        )
    }


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults for what is missing, after checking its keys."""
    usual = defaults()
    for key in config:
        _checks.one_of("The evaluation's config", list(usual), key=key)
    parts = ("score", "mesh", "prompt_format")
    for part in parts:
        for key in config.get(part, {}):
            owner = f"The evaluation's config.{part}"
            _checks.one_of(owner, list(usual[part]), key=key)
        usual[part] |= dict(config.get(part, {}))
    found = usual | {key: config[key] for key in config if key not in parts}
    _checks.one_of("The evaluation", evaluation.ROLES, role=found["role"])
    if not found["model"]:
        raise ValueError(
            "evaluate needs a model or a run's folder, got none. Name it after the "
            "command, as in: jaxunlearn evaluate runs/a"
        )
    return found


def _tasks(c: Mapping[str, Any], record) -> dict[str, tasks.Task]:
    """The tasks of the config, of its benchmarks and, for a run, of its files."""
    described = dict(c["tasks"])
    for name in c["benchmarks"]:
        described |= benchmarks.tasks(name, c["prompt_format"])
    found = sources.read(described, c["folder"])
    if record is None:
        return found
    missing = {name: name for name in ("forget", "retain") if name not in found}
    return of_run.read_tasks(record, missing) | found


def _mesh(shape: Mapping[str, int]):
    return sharding.make_mesh(**shape) if set(shape.values()) != {1} else None


def _judge(name: str, where: str) -> values.Judge:
    """The function that "module:function" names."""
    module, _, function = str(where).partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The judge {name!r} needs 'module:function', got {where!r}: {error}."
        ) from error
