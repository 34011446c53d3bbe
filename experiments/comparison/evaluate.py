# SPDX-License-Identifier: Apache-2.0
"""TOFU's complete evaluation of models in the small world, and how long it takes.

    python -m experiments.comparison.evaluate --folder runs/evaluations

Evaluates the original model, the retrained one and the model after each of METHODS on
forget05, retain, real authors and world facts, as TOFU publishes them, with holdout05
for the membership attacks. FOLDER gets one evaluation a model, in the form of
jaxunlearn.workflows.evaluation. Rows longer than the world's limit were never trained
on; they are counted, reported and left out. FOLDER/seconds.json has the seconds of
unlearning and of each evaluation.
"""

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import command
from experiments.small import methods, questions, unlearn, world
from jaxunlearn import _checks, data
from jaxunlearn.io import log
from jaxunlearn.workflows import records
from jaxunlearn.workflows.evaluation import printed, tasks
from jaxunlearn.workflows.evaluation import run as evaluation

# Method -> the rate with the best balance in experiments/comparison/README.md.
METHODS = {"blur.npo": 2e-3, "openunlearning.npo": 2e-3}
STEPS, BATCH_SIZE = 20, 8
TABLES = {
    "forget": "forget{part}_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "holdout": "holdout{part}",
}


def read(small: world.World, part: str = "05", folder: str = "") -> dict[str, Any]:
    """Task -> rows of TOFU; a world of made-up authors has only its own questions.

    Args:
        small: the world; its source of facts decides.
        part: of TOFU, "01", "05" or "10".
        folder: of the data sets, as for questions.data_folder.
    Raises:
        FileNotFoundError, ValueError: as data.tofu.read.
    """
    if small.about["config"]["facts"]["source"] != "tofu":
        return dict(small.questions)
    place = questions.data_folder(folder)
    return {
        task: data.tofu.read(table.format(part=part), place)
        for task, table in TABLES.items()
    }


def run(
    small: world.World,
    folder: Path,
    eval_sets: Mapping[str, Sequence[tasks.Row]],
    *,
    rates: Mapping[str, float] = METHODS,
    steps: int = STEPS,
    resamples: int = 1000,
    command: str = "",
    log_fn: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """Evaluates the original, the retrained and the unlearned models into `folder`.

    Args:
        small: the world of all models.
        folder: gets a folder for each model, named after its method.
        eval_sets: task -> rows, as `read` returns them.
        rates: method -> its learning rate.
        steps: of unlearning.
        resamples: of the bootstrap.
        command: recorded in about.json.
        log_fn: gets a line for each task.
    Returns:
        {"unlearning": name -> seconds, "evaluation": name -> seconds}. An evaluation
        that is in the folder already is not repeated, so it takes little time.
    Raises:
        ValueError: for an unknown method, or rows that cannot be scored.
    """
    known = methods.methods()
    for name in rates:
        _checks.one_of("small.evaluate", sorted(known), method=name)
    options = evaluation.Options(
        settings=tasks.Settings(
            data.PromptFormat(end="eos"), length=small.about["length"], new_tokens=48
        ),
        num_resamples=resamples,
        command=command,
        log_fn=log_fn,
    )
    made: dict[str, Any] = {
        "retrained": (small.retrained, dict(role="retrained"), 0.0, []),
        "original": (small.params, dict(role="original"), 0.0, []),
    }
    streams = unlearn.tables(small) if rates else {}
    for name, rate in rates.items():
        start, steps_log = time.perf_counter(), []
        runner = unlearn.runner(
            small, known[name], streams, steps=steps, batch_size=BATCH_SIZE
        )
        params, _ = unlearn.run(
            runner, rate=rate, seed=0, hooks=[lambda _, x, to=steps_log: to.append(x)]
        )
        about = dict(role="unlearned", method=name, seed=0)
        made[short(name)] = (params, about, time.perf_counter() - start, steps_log)
    seconds: dict[str, dict[str, float]] = {"unlearning": {}, "evaluation": {}}
    for name, (params, about, spent, steps_log) in made.items():
        log_fn(f"{name}:")
        start = time.perf_counter()
        evaluation.evaluate_model(
            small.model,
            params,
            small.tokenizer,
            eval_sets,
            folder / name,
            options,
            name=name,
            retrained=folder / "retrained" if name != "retrained" else None,
            **about,
        )
        seconds["evaluation"][name] = time.perf_counter() - start
        if steps_log:
            seconds["unlearning"][name] = spent
            file = log.JsonLines(folder / name / "training.jsonl")
            for entry in steps_log:
                file(None, entry)
    return seconds


def short(method: str) -> str:
    """The name of a method's folder: "blur.npo" is blur_npo, the peer's are bare."""
    return method.removeprefix("openunlearning.").replace(".", "_")


def main(arguments: command.Arguments) -> None:
    """Makes or reads the world, evaluates, and prints the scores and the seconds."""
    config, _, options = arguments
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = lambda message, *_: _log(f"warning: {message}")
    line = "python -m experiments.comparison.evaluate " + shlex.join(sys.argv[1:])
    folder = Path(options.folder).expanduser()
    small = world.make(config, progress=True)
    rows = read(small, options.part, config.facts.get("folder"))
    start = time.perf_counter()
    seconds: dict[str, Any] = run(small, folder, rows, command=line, log_fn=_log)
    seconds["all"] = time.perf_counter() - start
    records.write(folder / "seconds.json", seconds)
    for name in seconds["evaluation"]:
        print(f"== {name}")
        for text in printed.everything(records.read(folder / name / "metrics.json")):
            print(text)
    total = sum(seconds["evaluation"].values())
    print(f"Evaluated {len(seconds['evaluation'])} models in {total:.0f} s.")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.main(
        main,
        __doc__,
        config="experiments/small/configs/tofu.py",
        options={
            "--folder": dict(default="runs/evaluations", help="for the evaluations"),
            "--part": dict(
                default="05", choices=["01", "05", "10"], help="what is forgotten"
            ),
        },
    )
