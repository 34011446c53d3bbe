# SPDX-License-Identifier: Apache-2.0
"""Asks a model everything that says whether it forgot, once.

    python -m jaxunlearn.workflows.evaluation.run --config=experiments/configs/evaluate.py \\
        --config.model=PATH --config.output=EVAL [--config.retain=EVAL_OF_RETRAINED]

EVAL gets what jaxunlearn/workflows/evaluation/folder.py lists: values of every row, numbers with
intervals, tokens of the rows to forget. The same command again does nothing; where the
model, the data or a setting changed, only what depends on it is done again, and an
evaluation that was cut off goes on after its last finished task. In code,

    evaluate_model(model, params, tokenizer, {"forget": rows, ...}, "EVAL")
"""

import importlib
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from jaxunlearn import _checks, sharding
from jaxunlearn.io import hf
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import summary, tasks, values

ROLES = ("original", "retrained", "unlearned")
LIBRARIES = ("jaxunlearn", "jax", "jaxlib", "numpy", "transformers", "tokenizers")
REFUSED = (ValueError, TypeError, ImportError, OSError, _checks.Missing)


def defaults() -> ConfigDict:
    """Every setting of an evaluation; `tasks` is filled in."""
    return ConfigDict(
        {
            "model": "",  # a path as hf.load takes it, or "smollm2"
            "output": "",
            "retain": "",  # the evaluation of the retrained model
            "name": "",  # the output's name if empty
            "role": "unlearned",  # or "original" or "retrained"
            "method": "",
            "seed": -1,  # of the unlearning, to be told apart; -1 for none
            "folder": "",  # above tofu/ and the like; JAXUNLEARN_DATA if empty
            "tasks": {},  # as tasks.read takes them
            "judges": {},  # name -> "module:function", see values.of_task
            "score": dict(tasks.Settings()._asdict()),
            "batch_size": 32,
            "resamples": 1000,  # of the bootstrap
            "dtype": "float32",
            "compute_dtype": "float32",
            "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
        }
    )


def evaluate_model(
    model: Model,
    params: Params,
    tokenizer: Any,
    asked: Mapping[str, tasks.Task | Sequence[tasks.Row]],
    output: str | Path,
    *,
    name: str = "",
    role: str = "unlearned",
    method: str | None = None,
    seed: int | None = None,
    retain: str | Path | None = None,
    settings: tasks.Settings = tasks.Settings(),  # noqa: B008  a NamedTuple
    judges: Mapping[str, values.Judge] | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    mesh: Mesh | None = None,
    command: str = "",
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluates params into a folder; what is there already is not done again.

    Args:
        model, params: who is asked.
        tokenizer: a fast tokenizer.
        asked: task -> its rows or a Task; "forget", "retain", "real_authors" and
            "world_facts" together give TOFU's numbers, "holdout" the attacks.
        output: the folder.
        name, role, method, seed: told in about.json.
        retain: the folder of the retrained model's evaluation.
        settings: how rows are put and scored, where a task says nothing else.
        judges: name -> a function from all generated texts of a task to a number each,
            such as a classifier's probability that a text is fluent. What was judged is
            not judged again under the same name.
        batch_size: rows at a time.
        resamples: of the bootstrap.
        mesh: where the params lie, if they do on one.
        command: told in about.json.
        say: gets a line for each task.
    Returns:
        What metrics.json holds, {"tasks": ..., "overall": ...}.
    Raises:
        ValueError: for data that cannot be scored, as tasks.make and tasks.fit say, or
            a `retain` of other data. FileNotFoundError: if that is not there.
    Warns:
        UserWarning: with the number of rows that are too long, and with ids to forget
            and to retain.
    """
    say = say or (lambda line: None)
    _checks.one_of("evaluate_model", ROLES, role=role)
    _checks.positive_int("evaluate_model", batch_size=batch_size, resamples=resamples)
    _checks.one_of("evaluate_model", tuple(values.EPS), compat=settings.compat)
    judges = dict(judges or {})
    if clash := set(judges) & {*summary.MEANS, "perplexity", "rows_left_out", "id"}:
        raise ValueError(
            f"evaluate_model needs judges of other names than {_checks.listed(clash)}, "
            "which are columns already."
        )
    if not asked:
        raise ValueError("evaluate_model needs at least one task, got none.")
    asked = {
        name: each if isinstance(each, tasks.Task) else tasks.make(name, each)
        for name, each in asked.items()
    }
    tasks.overlap(asked)
    output = Path(output).expanduser()
    retained = folders.retained(retain, asked, settings) if retain else None
    params_digest = folders.params_digest(params)
    made_of = [
        folders.VERSION,
        params_digest,
        repr(model.config),
        folders.tokenizer_digest(tokenizer),
        sorted(judges),
    ]
    own = {each: task.settings(settings) for each, task in asked.items()}
    keys = {
        each: folders.digest([made_of, own[each]._asdict(), task.kind, task.digest])
        for each, task in asked.items()
    }
    entries = folders.entries(output)
    told = [name, role, method, seed, resamples, list(keys.items())]
    last = folders.digest([told, retained.key if retained else None])
    missing = [
        each
        for each, key in keys.items()
        if not folders.valid(output, each, entries.get(each), key)
    ]
    if not missing and set(entries) == set(asked):
        if folders.summary_key(output) == last:
            say(f"Nothing changed: {output} is as it was.")
            return folders.read(output / "metrics.json")
    for each in set(entries) - set(asked):
        folders.remove(output, each)
        del entries[each]
    for each, task in asked.items():
        if each not in missing:
            say(f"{each}: unchanged.")
            continue
        start = time.perf_counter()
        longest = getattr(model.config, "max_length", None)
        kept = tasks.fit(task, tokenizer, own[each], longest)
        found, shown = values.of_task(
            model,
            params,
            tokenizer,
            task,
            kept,
            own[each],
            judges=judges,
            batch_size=batch_size,
            mesh=mesh,
        )
        digest = folders.write_rows(output, each, found, shown)
        seconds = time.perf_counter() - start
        entries[each] = folders.Entry(keys[each], digest, kept.left_out, seconds)
        folders.write_cache(output, entries, None)
        say(f"{each}: {len(found)} rows in {seconds:.1f} s.")
    start = time.perf_counter()
    rows = {each: folders.rows(output, each) for each in asked}
    for each in retained.rows if retained else ():
        folders.same_rows(retained, each, rows[each])
    how = dict(resamples=resamples, seed=0)
    metrics = {
        "tasks": {
            each: summary.of_task(
                rows[each], len(entries[each].left_out), judges=list(judges), **how
            )
            for each in asked
        },
        "overall": summary.overall(
            rows,
            retained.rows if retained else None,
            compat=settings.compat,
            **how,
        ),
    }
    folders.write(output / "metrics.json", metrics)
    seconds = time.perf_counter() - start + sum(x.seconds for x in entries.values())
    about = {
        "name": name or output.name,
        "role": role,
        "method": method,
        "seed": seed,
        "params_digest": params_digest,
        "data": {each: task.digest for each, task in asked.items()},
        "kinds": {each: task.kind for each, task in asked.items()},
        "left_out": {each: list(entries[each].left_out) for each in asked},
        "retain": str(retained.folder) if retained else None,
        "versions": {x: metadata.version(x) for x in LIBRARIES},
        "command": command,
        "seconds": seconds,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "settings": settings._asdict(),
    }
    if apart := {each: dict(task.score) for each, task in asked.items() if task.score}:
        about["settings"]["tasks"] = apart
    folders.write(output / "about.json", about)
    folders.write_cache(output, entries, last)
    return folders.read(output / "metrics.json")


def run(config: ConfigDict, command: str = "") -> dict[str, Any]:
    """Evaluates what a config names; what metrics.json holds.

    Raises:
        ValueError, FileNotFoundError: as tasks.read and evaluate_model.
    """
    for key in config:
        _checks.one_of("The evaluation's config", list(defaults()), key=key)
    for key in config.score:
        known = list(tasks.Settings._fields)
        _checks.one_of("The evaluation's config.score", known, key=key)
    for key in ("model", "output"):
        if not config[key]:
            raise ValueError(f"The evaluation needs --config.{key}=PATH, got none.")
    asked = tasks.read(config.tasks.to_dict(), config.folder)
    grid = config.mesh.to_dict()
    mesh = sharding.make_mesh(**grid) if set(grid.values()) != {1} else None
    model, params, tokenizer = hf.load(
        config.model,
        dtype=config.dtype,
        compute_dtype=config.compute_dtype,
        remat="none",
        mesh=mesh,
    )
    folders.check_tokenizer(tokenizer, config.model)
    return evaluate_model(
        model,
        params,
        tokenizer,
        asked,
        config.output,
        name=config.name,
        role=config.role,
        method=config.method or None,
        seed=None if config.seed < 0 else config.seed,
        retain=config.retain or None,
        settings=tasks.Settings(**config.score.to_dict()),
        judges={name: _function(name, where) for name, where in config.judges.items()},
        batch_size=config.batch_size,
        resamples=config.resamples,
        mesh=mesh,
        command=command,
        say=_say,
    )


def _function(name: str, where: str) -> values.Judge:
    """The judge that "module:function" names."""
    module, _, function = str(where).partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The judge {name!r} needs 'module:function', got {where!r}: {error}."
        ) from error


def in_words(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each task and one for all together."""
    lines = []
    for name, each in (*metrics["tasks"].items(), ("overall", metrics["overall"])):
        told = []
        for key, number in each.items():
            value, low, high = (number[x] for x in ("value", "low", "high"))
            said = "not measured" if value is None else f"{value:.4g}"
            told.append(f"{key} {said}")
            if low is not None:
                told[-1] += f" [{low:.3g}, {high:.3g}]"
        lines.append(f"{name}: {', '.join(told)}")
    return lines


def main(argv: list[str]) -> None:
    """Checks the config, evaluates and says what came out."""
    logging.set_verbosity(logging.WARNING)
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    command = "python -m jaxunlearn.workflows.evaluation.run " + shlex.join(
        sys.argv[1:]
    )
    try:
        if len(argv) > 1 or flags.FLAGS.config is None:
            raise ValueError(
                f"evaluate needs --config=FILE and nothing bare, got {argv[1:]}."
            )
        found = run(flags.FLAGS.config, command)
    except REFUSED as error:
        _say(f"error: {error}")
        raise SystemExit(2) from error
    for line in in_words(found):
        print(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a config's file")
    app.run(main)
