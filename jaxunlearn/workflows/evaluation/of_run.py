# SPDX-License-Identifier: Apache-2.0
"""Evaluates the models of a run: original, unlearned and, if given, retrained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxunlearn import _text, data
from jaxunlearn.workflows import run_folder
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import run as evaluation
from jaxunlearn.workflows.evaluation import sources, tasks

FILES = ("file", "jsonl")  # sources of a stream whose rows can be read again


def evaluate_run(
    run: run_folder.RunFolder,
    record: run_folder.Record,
    eval_tasks: evaluation.Tasks,
    options: evaluation.Options,
    *,
    retrained: str | Path = "",
) -> dict[str, dict[str, Any]]:
    """Evaluates a run's models into its folder; as evaluation.evaluate_model.

    Args:
        run, record: as run_folder.finished gives them.
        eval_tasks: task -> its rows or a Task.
        options: how the models are evaluated.
        retrained: a retrained model, or the folder of its evaluation.
    Returns:
        role -> the content of metrics.json, in the order original, unlearned,
        retrained.
    """
    found, reference = {}, None
    eval_tasks = evaluation.as_tasks(eval_tasks)

    def evaluate(role: str, path: str | Path, name: str, **about: Any) -> None:
        output = run.evaluation(role)
        options.log_fn(f"Evaluating the {role} model {path} into {output}.")
        found[role] = evaluation.evaluate_path(
            path, eval_tasks, output, options, name=name, role=role, **about
        )

    if retrained:
        reference = Path(retrained).expanduser()
        if not folders.is_evaluation(reference):
            evaluate("retrained", retrained, "retrained")
            reference = run.evaluation("retrained")
    common = dict(retrained=reference)
    evaluate("original", record.original, "original", **common)
    name = run.path.resolve().name
    common |= dict(method=record.method, seed=record.seed)
    evaluate("unlearned", run.model, name, **common)
    return {role: found[role] for role in run_folder.ROLES if role in found}


def read_tasks(
    record: run_folder.Record, stream_names: Mapping[str, str]
) -> dict[str, tasks.Task]:
    """Tasks from the files that a run was trained on, in the formats of its streams.

    Running text is plain, whatever the run's format.

    Args:
        record: the run's.
        stream_names: task -> name of the stream.
    Raises:
        ValueError: if a stream is not a file.
    """
    found = {}
    for name, stream_name in stream_names.items():
        stream = file_stream(record, stream_name)
        prompt_format = stream_format(record, stream_name)
        if stream.answer:
            rows = sources.read_file(
                stream.path, question=stream.prompt, answer=stream.answer
            )
        else:
            rows = sources.read_text_file(stream.path, stream.prompt)
            if all(_text.separator(x["question"], x["answer"]) == "" for x in rows):
                prompt_format = prompt_format.with_settings({"separator": ""})
        differs = prompt_format != record.prompt_format
        score = {"prompt_format": prompt_format.as_dict()} if differs else {}
        found[name] = tasks.make(name, rows, score=score)
    return found


def stream_format(record: run_folder.Record, name: str) -> data.PromptFormat:
    """How prompts and answers of one of the run's streams were joined."""
    if not record.streams[name].answer:
        return data.PromptFormat()
    common = data.PromptFormat().with_settings(record.config.get("prompt_format", {}))
    given = record.config.get("data", {}).get(name, {}).get("prompt_format")
    return common.with_settings(given or {})


def file_stream(record: run_folder.Record, name: str) -> run_folder.Stream:
    """A stream of the run whose rows are in a file.

    Raises:
        ValueError: if the run has no such stream, or its source is not a file.
    """
    stream = record.streams.get(name)
    if stream is None or stream.source not in FILES:
        came = "no such rows" if stream is None else f"the source {stream.source!r}"
        raise ValueError(
            f"The run's {name} rows are needed as a file, got {came}. Pass --{name} "
            "FILE."
        )
    return stream
