# SPDX-License-Identifier: Apache-2.0
"""Evaluates models into folders: of a run, of a path, or in memory.

    evaluate_model(model, params, tokenizer, {"forget": rows, ...}, "EVAL")

The folder gets what workflows/evaluation/folder.py lists. Calling again does nothing if
nothing changed. If the model, the data or a setting changed, only what depends on it is
computed again, and an interrupted evaluation resumes after its last finished task.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxunlearn import _checks
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows import loading, records
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import summary, tasks, values

ROLES = ("original", "retrained", "unlearned")
LIBRARIES = ("jaxunlearn", "jax", "jaxlib", "numpy", "transformers", "tokenizers")
COLUMNS = {*summary.MEANS, "perplexity", "rows_left_out", "id"}

Tasks = Mapping[str, tasks.Task | Sequence[tasks.Row]]


class Options(NamedTuple):
    """How models are evaluated, whichever model it is.

    Attributes:
        settings: how a model is prompted and scored, where a task says nothing else.
        judges: name -> a function from all generated texts of a task to one number
            each, such as a classifier's probability that a text is fluent. A judge is
            known by its name: what it scored is not scored again.
        batch_size: number of rows in a batch.
        num_resamples: of the bootstrap.
        mesh: the mesh of the params, if they are on one.
        dtype, compute_dtype: of a model that is loaded from a path.
        command: the command line, recorded in about.json.
        log_fn: called with one line for each task.
    """

    settings: tasks.Settings = tasks.Settings()
    judges: Mapping[str, values.Judge] = {}
    batch_size: int = 32
    num_resamples: int = 1000
    mesh: Mesh | None = None
    dtype: str = "float32"
    compute_dtype: str = "auto"
    command: str = ""
    log_fn: Callable[[str], None] = lambda line: None


def evaluate_path(
    path: str | Path,
    eval_tasks: Tasks,
    output: str | Path,
    options: Options = Options(),  # noqa: B008  a NamedTuple
    **about: Any,
) -> dict[str, Any]:
    """Evaluates the model at a path; as evaluate_model.

    Args:
        path: a Hugging Face folder, a GGUF file, a name on the hub, or "smollm2".
        eval_tasks, output, options, about: as for evaluate_model.
    Raises:
        FileNotFoundError, ValueError: as loading.load and evaluate_model.
    """
    eval_tasks = as_tasks(eval_tasks)
    model, params, tokenizer = loading.load(
        path,
        dtype=options.dtype,
        compute_dtype=options.compute_dtype,
        mesh=options.mesh,
    )
    return evaluate_model(
        model, params, tokenizer, eval_tasks, output, options, **about
    )


def evaluate_model(
    model: Model,
    params: Params,
    tokenizer: Any,
    eval_tasks: Tasks,
    output: str | Path,
    options: Options = Options(),  # noqa: B008  a NamedTuple
    *,
    name: str = "",
    role: str = "unlearned",
    method: str | None = None,
    seed: int | None = None,
    retrained: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluates a model into a folder; finished tasks are not evaluated again.

    Args:
        model, params: the model to evaluate.
        tokenizer: a fast tokenizer.
        eval_tasks: task -> its rows or a Task. "forget", "retain", "real_authors" and
            "world_facts" together give TOFU's numbers; "holdout" gives the membership
            attacks.
        output: the folder.
        options: how the model is evaluated.
        name: what a report calls the model; the folder's name if empty.
        role: one of ROLES.
        method, seed: of unlearning, recorded in about.json.
        retrained: the folder of the retrained model's evaluation.
    Returns:
        The content of metrics.json, {"tasks": ..., "overall": ...}.
    Raises:
        ValueError: for data that cannot be scored, as tasks.make and tasks.encode, or a
            `retrained` of other data. FileNotFoundError: if `retrained` is not there.
    Warns:
        UserWarning: with the number of rows that are too long, and with the ids that
            are both in forget and in retain.
    """
    _check(role, options)
    eval_tasks = as_tasks(eval_tasks)
    tasks.overlap(eval_tasks)
    output = Path(output).expanduser()
    settings = {n: t.with_defaults(options.settings) for n, t in eval_tasks.items()}
    reference = None
    if retrained:
        reference = folders.read_reference(retrained, eval_tasks, options.settings)
    model_key = records.model_key(model, params, tokenizer)
    shared = [folders.VERSION, *model_key, sorted(options.judges)]
    keys = {
        name: records.digest([shared, settings[name].as_dict(), task.kind, task.digest])
        for name, task in eval_tasks.items()
    }
    about = [name, role, method, seed, options.num_resamples, list(keys.items())]
    metrics_key = records.digest([about, reference.key if reference else None])
    entries = folders.read_cache(output)
    current = {
        name
        for name, key in keys.items()
        if folders.rows_are_current(output, name, entries.get(name), key)
    }
    if current == set(entries) == set(eval_tasks):
        if folders.metrics_key(output) == metrics_key:
            options.log_fn(f"Nothing changed: {output} is up to date.")
            return records.read(output / "metrics.json")
    records.make_folder("evaluate", output)
    for task_name in set(entries) - set(eval_tasks):
        folders.remove_task(output, task_name)
        del entries[task_name]
    for task_name, task in eval_tasks.items():
        if task_name in current:
            options.log_fn(f"{task_name}: unchanged.")
            continue
        start = time.perf_counter()
        limit = getattr(model.config, "max_length", None)
        encoded = tasks.encode(task, tokenizer, settings[task_name], limit)
        rows, tokens = values.of_task(
            model,
            params,
            tokenizer,
            task,
            encoded,
            settings[task_name],
            judges=options.judges,
            batch_size=options.batch_size,
            mesh=options.mesh,
        )
        digest = folders.write_rows(output, task_name, rows, tokens)
        seconds = time.perf_counter() - start
        entries[task_name] = folders.CacheEntry(
            keys[task_name], digest, encoded.left_out, seconds
        )
        folders.write_cache(output, entries, None)
        options.log_fn(f"{task_name}: {len(rows)} rows in {seconds:.1f} s.")
    start = time.perf_counter()
    metrics = _summarise(output, eval_tasks, entries, reference, options)
    records.write(output / "metrics.json", metrics)
    seconds = time.perf_counter() - start + sum(x.seconds for x in entries.values())
    common = options.settings.as_dict()
    if differ := {n: dict(t.score) for n, t in eval_tasks.items() if t.score}:
        common["tasks"] = differ
    about = {
        "name": name or output.name,
        "role": role,
        "method": method,
        "seed": seed,
        "params_digest": model_key[0],
        "data": {name: task.digest for name, task in eval_tasks.items()},
        "kinds": {name: task.kind for name, task in eval_tasks.items()},
        "left_out": {name: list(entries[name].left_out) for name in eval_tasks},
        "retrained": str(reference.folder) if reference else None,
        "versions": records.versions(*LIBRARIES),
        "command": options.command,
        "seconds": seconds,
        "devices": records.devices(),
        "compute_dtype": getattr(model.config, "compute_dtype", None),
        "settings": common,
    }
    records.write(output / "about.json", about)
    folders.write_cache(output, entries, metrics_key)
    return records.read(output / "metrics.json")


def as_tasks(given: Tasks) -> dict[str, tasks.Task]:
    """The tasks, rows made into tasks and checked."""
    if not given:
        raise ValueError(
            "An evaluation needs at least one task, got none. Pass --forget FILE, "
            "--retain FILE or --tasks NAME."
        )
    return {
        name: each if isinstance(each, tasks.Task) else tasks.make(name, each)
        for name, each in given.items()
    }


def _check(role: str, options: Options) -> None:
    owner = "An evaluation"
    _checks.one_of(owner, ROLES, role=role)
    _checks.positive_int(
        owner, batch_size=options.batch_size, num_resamples=options.num_resamples
    )
    _checks.one_of(owner, tuple(values.EPS), compat=options.settings.compat)
    if clash := set(options.judges) & COLUMNS:
        raise ValueError(
            f"An evaluation needs judges with other names than {_checks.listed(clash)},"
            " which are columns of the rows."
        )


def _summarise(output, eval_tasks, entries, reference, options) -> dict[str, Any]:
    """The content of metrics.json, from the rows of the folder."""
    rows = {name: folders.read_rows(output, name) for name in eval_tasks}
    for name in reference.rows if reference else ():
        folders.check_same_rows(reference, name, rows[name])
    bootstrap = dict(num_resamples=options.num_resamples, seed=0)
    return {
        "tasks": {
            name: summary.of_task(
                rows[name],
                len(entries[name].left_out),
                judges=list(options.judges),
                **bootstrap,
            )
            for name in eval_tasks
        },
        "overall": summary.overall(
            rows,
            reference.rows if reference else None,
            compat=options.settings.compat,
            **bootstrap,
        ),
    }
