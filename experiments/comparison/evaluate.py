# SPDX-License-Identifier: Apache-2.0
"""The whole TOFU evaluation of models in the small world, and how long it takes.

    python -m experiments.comparison.evaluate --config=experiments/small/configs/tofu.py \\
        --folder=runs/evaluations

Asks the model that knows every author (original), its twin that never saw those to
forget (retrained) and the model after each of METHODS on forget05, retain, real authors
and world facts, as TOFU publishes them, with holdout05 for the attacks: an evaluation a
model in FOLDER, as jaxunlearn/workflows/evaluation/run.py writes it. A row longer than the world's
limit was never trained on; such rows are counted, told and left out. What making the
models, which is no evaluation, and each evaluation took is in FOLDER/seconds.json.
"""

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.small import methods, questions, unlearn, world
from jaxunlearn import _checks, data
from jaxunlearn.io import log
from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.evaluation import run as evaluate
from jaxunlearn.workflows.evaluation import tasks

# Method -> the rate that experiments/comparison/results/small.md found the best balance.
METHODS = {"blur.npo": 2e-3, "openunlearning.npo": 2e-3}
STEPS, ROWS = 20, 8
TABLES = {
    "forget": "forget{part}_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "holdout": "holdout{part}",
}


def read(small: world.World, part: str = "05", folder: str = "") -> dict[str, Any]:
    """Task -> rows, as TOFU has them; a world of its own authors has no other tables.

    Args:
        small: whose facts decide.
        part: of TOFU, "01", "05" or "10".
        folder: of the data sets, as questions.data_folder takes it.
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
    asked: Mapping[str, Sequence[tasks.Row]],
    *,
    rates: Mapping[str, float] = METHODS,
    steps: int = STEPS,
    resamples: int = 1000,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """Evaluates the original, the retrained and the unlearned models into `folder`.

    Args:
        small: where they are.
        folder: gets a folder a model, named after its method.
        asked: as `read` gives it.
        rates: method -> its learning rate.
        steps: of unlearning.
        resamples: of the bootstrap.
        command: told in about.json.
        say: gets a line for each task.
    Returns:
        {"unlearning": name -> seconds, "evaluation": name -> seconds}; what was there
        already counts as the little time it took to see that.
    Raises:
        ValueError: for a method that is not known, or rows that cannot be scored.
    """
    known = methods.methods()
    for name in rates:
        _checks.one_of("small.evaluate", sorted(known), method=name)
    settings = tasks.Settings(length=small.about["length"], new_tokens=48)
    made: dict[str, Any] = {
        "retrained": (small.retrained, dict(role="retrained"), 0.0, []),
        "original": (small.params, dict(role="original"), 0.0, []),
    }
    streams = unlearn.tables(small) if rates else {}
    for name, rate in rates.items():
        start, steps_log = time.perf_counter(), []
        runner = unlearn.runner(
            small, known[name], streams, steps=steps, batch_size=ROWS
        )
        params, _ = unlearn.run(
            runner, rate=rate, seed=0, hooks=[lambda _, x, to=steps_log: to.append(x)]
        )
        about = dict(role="unlearned", method=name, seed=0)
        made[short(name)] = (params, about, time.perf_counter() - start, steps_log)
    seconds: dict[str, dict[str, float]] = {"unlearning": {}, "evaluation": {}}
    for name, (params, about, spent, steps_log) in made.items():
        say(f"{name}:")
        start = time.perf_counter()
        evaluate.evaluate_model(
            small.model,
            params,
            small.tokenizer,
            asked,
            folder / name,
            name=name,
            retain=folder / "retrained" if name != "retrained" else None,
            settings=settings,
            resamples=resamples,
            command=command,
            say=say,
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


def main(argv: list[str]) -> None:
    """Makes or reads the world, evaluates, and says how long it took."""
    del argv
    logging.set_verbosity(logging.WARNING)
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    command = "python -m experiments.comparison.evaluate " + shlex.join(sys.argv[1:])
    folder = Path(flags.FLAGS.folder).expanduser()
    try:
        small = world.make(flags.FLAGS.config, progress=True)
        asked = read(small, flags.FLAGS.part, flags.FLAGS.config.facts.get("folder"))
        start = time.perf_counter()
        seconds: dict[str, Any] = run(small, folder, asked, command=command, say=_say)
    except evaluate.REFUSED as error:
        _say(f"error: {error}")
        raise SystemExit(2) from error
    seconds["all"] = time.perf_counter() - start
    folders.write(folder / "seconds.json", seconds)
    for name in seconds["evaluation"]:
        print(f"== {name}")
        for line in evaluate.in_words(folders.read(folder / name / "metrics.json")):
            print(line)
    whole = sum(seconds["evaluation"].values())
    print(f"Evaluated {len(seconds['evaluation'])} models in {whole:.0f} s.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_string("folder", "runs/evaluations", "where evaluations go")
    flags.DEFINE_enum("part", "05", ["01", "05", "10"], "which part is forgotten")
    app.run(main)
