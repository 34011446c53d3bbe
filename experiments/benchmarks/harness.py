# SPDX-License-Identifier: Apache-2.0
"""One exported model in lm-evaluation-harness and under our scoring, on MMLU.

    python -m experiments.benchmarks.harness --model runs/quickstart/model \\
        --output harness_mmlu

500 questions of MMLU's test file, spread over the subjects of those that have at most
--max-characters characters with their options, as a local task of the harness:
zero-shot, once with letters and once with the texts of the answers to choose from.
The accuracy is computed in three ways: by the harness's model on the exported folder
(transformers, torch), by our decoder in the harness (jaxunlearn.workflows.harness), and
by `evaluate.choose` without the harness. All choose the option with the largest summed
log-probability. The files are written after the second and the third.

Reads MMLU from --folder or the folder that JAXUNLEARN_DATA names.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import page
from experiments.small import questions
from jaxunlearn import _checks, data, evaluate
from jaxunlearn.io import hf

COUNT = 500
MAX_CHARACTERS = 300  # of a question and its options; half of all have more
MAX_APART = 2  # questions by which accuracies may differ
FORMS = ("letters", "texts")
HARNESS, OURS, ADAPTER = "harness, hf", "evaluate.choose", "harness, jaxunlearn"
LETTERS = ("A", "B", "C", "D")
LIBRARIES = ("jaxunlearn", "jax", "lm_eval", "transformers", "torch")

Row = Mapping[str, Any]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs all three ways, prints the numbers and writes them."""
    options = parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the harness reads only local files
    place = Path(options.model).expanduser()
    rows = data.mmlu.read("test", questions.data_folder(options.folder))
    rows = spread(short(rows, options.max_characters), options.count)
    forms = options.forms.split(",")
    for form in forms:
        _checks.one_of("The comparison", FORMS, forms=form)
    found: dict[str, Any] = {}
    result: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_task(rows, Path(folder), forms)
        for way in (HARNESS, OURS, ADAPTER):
            start = time.perf_counter()
            if way == OURS:
                model, params, tokenizer = hf.load(place, remat="none")
                found[way] = {
                    form: picks(model, params, tokenizer, rows, form) for form in forms
                }
                del model, params
            else:
                name = "hf" if way == HARNESS else "jaxunlearn"
                found[way] = in_harness(name, place, Path(folder), forms)
            seconds = result["seconds"] | {way: time.perf_counter() - start}
            result = compare(rows, found) | {
                "seconds": seconds,
                "questions": len(rows),
                "subjects": len({row["subject"] for row in rows}),
                "versions": {name: metadata.version(name) for name in LIBRARIES},
                "command": "python -m experiments.benchmarks.harness "
                f"--model {options.model} --forms {options.forms} "
                f"--max-characters {options.max_characters}",
            }
            if len(found) > 1 and options.output:
                page.write_both(options.output, result, in_words(result))
    print("\n".join(in_words(result)))
    return result


def short(rows: Sequence[Row], max_characters: int) -> list[Row]:
    """Rows of at most so many characters, options included."""
    found = []
    for row in rows:
        if len(row["question"]) + sum(map(len, row["choices"])) <= max_characters:
            found.append(row)
    return found


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` rows at equal distances.

    Raises:
        ValueError: if there are fewer.
    """
    if not 1 <= count <= len(rows):
        raise ValueError(
            f"The comparison needs 1 to {len(rows)} questions, got count={count}."
        )
    return [rows[i * len(rows) // count] for i in range(count)]


def prompt(row: Row, form: str) -> str:
    """The text before the answer, without a space at the end."""
    if form == "texts":
        return f"Question: {row['question'].strip()}\nAnswer:"
    options = zip(LETTERS, row["choices"], strict=True)
    lines = [f"{letter}. {choice}" for letter, choice in options]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def options(row: Row, form: str) -> list[str]:
    """What can be chosen, without leading spaces."""
    return list(LETTERS) if form == "letters" else [x.strip() for x in row["choices"]]


def write_task(rows: Sequence[Row], folder: Path, forms: Sequence[str] = FORMS) -> None:
    """The questions as files that the harness reads, a task for each form."""
    for form in forms:
        lines = [
            json.dumps(
                {
                    "prompt": prompt(row, form),
                    "options": options(row, form),
                    "answer": row["answer"],
                }
            )
            for row in rows
        ]
        file = folder / f"{form}.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {  # YAML holds JSON
            "task": f"local_{form}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(file)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
            ],
        }
        text = json.dumps(settings, indent=1) + "\n"
        (folder / f"{form}.yaml").write_text(text, encoding="utf-8")


def in_harness(
    name: str, model: Path, folder: Path, forms: Sequence[str] = FORMS
) -> dict[str, list[int]]:
    """Form -> the option picked of every question, by a model in the harness.

    Args:
        name: "hf", the harness's model on torch, or "jaxunlearn", ours.
        model: an exported folder.
        folder: as `write_task` fills it.
        forms: those that it wrote.
    """
    import lm_eval
    from lm_eval import tasks

    from jaxunlearn.workflows import harness

    settings: dict[str, Any] = {"model": "hf", "batch_size": 8, "device": "cpu"}
    settings["model_args"] = {"pretrained": str(model), "dtype": "float32"}
    if name == "jaxunlearn":
        loaded = hf.load(model, remat="none")
        settings = {"model": harness.Decoder(*loaded)}
    found = lm_eval.simple_evaluate(
        **settings,
        tasks=[f"local_{form}" for form in forms],
        task_manager=tasks.TaskManager(
            include_path=str(folder), include_defaults=False
        ),
        bootstrap_iters=0,
    )
    picked = {}
    for form in forms:
        samples = found["samples"][f"local_{form}"]
        logps = [
            [each[0] for each in sample["filtered_resps"]]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        picked[form] = np.asarray(logps).argmax(1).tolist()
        right = np.mean([sample["acc"] for sample in samples])
        reported = found["results"][f"local_{form}"]["acc,none"]
        if abs(right - reported) > 1e-9:
            raise ValueError(
                f"The harness must report the mean of its samples, got {reported} for "
                f"{right}. Another version of lm_eval may report something else."
            )
    return picked


def picks(model, params, tokenizer, rows: Sequence[Row], form: str) -> list[int]:
    """The option that our scoring picks of every question."""
    prompts = [prompt(row, form) for row in rows]
    choices = [options(row, form) for row in rows]
    found = evaluate.choose(model, params, tokenizer, prompts, choices)
    return found.tolist()


def compare(
    rows: Sequence[Row], found: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, Any]:
    """Accuracies, and in how many questions each way differs from the first.

    Args:
        rows: the questions.
        found: way -> form -> picked options; the first way is compared with.
    """
    labels = np.asarray([row["answer"] for row in rows])
    first = next(iter(found))
    result: dict[str, Any] = {"right": {}, "accuracy": {}, "picked_otherwise": {}}
    for way, forms in found.items():
        right = {
            form: int((np.asarray(x) == labels).sum()) for form, x in forms.items()
        }
        result["right"][way] = right
        result["accuracy"][way] = {x: n / len(rows) for x, n in right.items()}
        result["picked_otherwise"][way] = {
            form: int((np.asarray(x) != np.asarray(found[first][form])).sum())
            for form, x in forms.items()
        }
    result["most_apart"] = max(
        abs(result["right"][way][form] - result["right"][first][form])
        for way in found
        for form in found[way]
    )
    result["met"] = result["most_apart"] <= MAX_APART
    return result


def in_words(result: Mapping[str, Any]) -> list[str]:
    """The numbers as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    forms = list(next(iter(result["right"].values())))
    heads = [
        head
        for form in forms
        for head in (f"{form}: right", "accuracy", "picked otherwise")
    ]
    out = [
        "# MMLU in lm-evaluation-harness and under our scoring",
        "",
        f"`{result['command']}`: {result['questions']} questions of "
        f"{result['subjects']} subjects, zero-shot; letters A to D or answer texts to "
        "choose from, by summed log-probability. *Picked otherwise*: "
        "questions where another option is picked than in the first row. "
        f"{versions}.",
        "",
    ]
    body = []
    for way, right in result["right"].items():
        cells = [way]
        for form in forms:
            accuracy = f"{result['accuracy'][way][form]:.3f}"
            cells += [right[form], accuracy, result["picked_otherwise"][way][form]]
        body.append([*cells, f"{result['seconds'][way]:.0f}"])
    out += page.table(["", *heads, "seconds"], body)
    out += [
        f"The numbers of right answers are at most {result['most_apart']} apart (at "
        f"most {MAX_APART} are allowed): {'met' if result['met'] else 'not met'}. "
        "Chance is 0.25.",
    ]
    return out


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an exported folder")
    parser.add_argument("--folder", default="", help="above mmlu/")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--max-characters", type=int, default=MAX_CHARACTERS)
    parser.add_argument("--forms", default=",".join(FORMS), help="names between commas")
    parser.add_argument("--output", help="path without suffix of .json and .md")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
