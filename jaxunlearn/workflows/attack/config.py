# SPDX-License-Identifier: Apache-2.0
"""Attacks from a config: a dict with the keys of `defaults`."""

from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks, data
from jaxunlearn.workflows import run_folder
from jaxunlearn.workflows.attack import facts, jobs, prompts, run
from jaxunlearn.workflows.evaluation import of_run


def defaults() -> dict[str, Any]:
    """Every setting of the attacks with its default."""
    usual = prompts.PromptSettings()._asdict()
    return {
        "model": "",  # a run's folder, or a model as loading.load takes it
        "original": "",  # the model before unlearning; a run knows it
        "output": "",  # not for a run's folder
        "seed": 0,
        "folder": "",  # the parent of the benchmarks; JAXUNLEARN_DATA if empty
        "facts": {},  # as facts.read takes them; a run's files if empty
        "forget": "",  # or two files of rows
        "retain": "",
        "max_rows": 0,  # of each file, drawn at random; 0 for all
        "known": "",  # see run.attack_model
        # How questions and answers are joined: the fields of data.PromptFormat.
        "prompt_format": data.PromptFormat().as_dict(),
        "query": {k: x for k, x in usual.items() if k != "prompt_format"},
        "attacks": {name: dict(x) for name, x in jobs.THOROUGH.items()},
        "only": "",  # names of attacks between commas; all if empty
        "dtype": "float32",
        "compute_dtype": "auto",  # the faster of bfloat16 and float32
    }


def attack(
    config: Mapping[str, Any], *, command: str = "", progress: bool = False
) -> tuple[dict[str, Any], str]:
    """Attacks the model or the run that a config names; as run.attack_model.

    Args:
        config: keys of `defaults`; those that are missing have their defaults.
        command: the command line, recorded on the card.
        progress: whether to show progress bars.
    Raises:
        ValueError, FileNotFoundError: for a config, facts or a model that cannot be
            used.
    """
    c = _complete(config)
    c["attacks"] = _chosen(c["attacks"], c["only"])
    jobs.plan(c["attacks"], has_original=bool(c["original"]))  # names before files
    prompt_format = data.PromptFormat()
    if run_folder.at(c["model"]).record.is_file():
        folder, record = run_folder.finished(c["model"])
        c["model"], c["output"] = folder.model, c["output"] or folder.attack
        c["original"] = c["original"] or record.original
        fact_set, prompt_format = _facts(c, record), record.prompt_format
    elif not c["output"]:
        raise ValueError(
            f"attack needs an output folder for a model that is not a run's folder, "
            f"got {c['model']}. Pass --output FOLDER."
        )
    else:
        fact_set = _facts(c)
    given = config.get("prompt_format", {})
    prompt_format = prompt_format.with_settings(given)
    prompt_format.check_chat("The attack's prompt_format", given)
    return run.attack_model(
        c["model"],
        fact_set,
        c["output"],
        original=c["original"],
        attacks=c["attacks"],
        settings=prompts.PromptSettings(prompt_format, **c["query"]),
        known=c["known"],
        seed=c["seed"],
        dtype=c["dtype"],
        compute_dtype=c["compute_dtype"],
        command=command,
        progress=progress,
    )


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults for what is missing, after checking its keys."""
    usual = defaults()
    for key in config:
        _checks.one_of("The attack's config", list(usual), key=key)
    for key in config.get("query", {}):
        _checks.one_of("The attack's config.query", list(usual["query"]), key=key)
    usual["query"] |= dict(config.get("query", {}))
    found = usual | {key: config[key] for key in config if key != "query"}
    if not found["model"]:
        raise ValueError(
            "attack needs a model or a run's folder, got none. Name it after the "
            "command, as in: jaxunlearn attack runs/a"
        )
    return found


def _chosen(attacks: Mapping[str, Any], only: str) -> dict[str, Any]:
    if not only:
        return dict(attacks)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        _checks.one_of("The attack", list(attacks), attack=name)
    return {name: attacks[name] for name in names}


def _facts(c: Mapping[str, Any], record=None) -> facts.FactSet:
    """The facts of the config, of its two files, or of the run's files."""
    if c["facts"]:
        return facts.read(c["facts"], c["folder"])
    files = {}
    for name in facts.NAMES:
        if c[name]:
            files[name] = facts.RowFile(c[name])
        elif record is None:
            raise ValueError(
                f"attack needs a file of rows to {name}, got none. Pass --{name} FILE."
            )
        else:
            files[name] = _file_of_run(record, name)
    return facts.read_files(**files, max_rows=c["max_rows"], seed=c["seed"])


def _file_of_run(record: run_folder.Record, name: str) -> facts.RowFile:
    stream = of_run.file_stream(record, name)
    if not stream.answer:
        raise ValueError(
            f"attack needs rows with a prompt and an answer, but the run's {name} rows "
            f"are running text. Pass --{name} FILE."
        )
    return facts.RowFile(stream.path, stream.prompt, stream.answer)
