# SPDX-License-Identifier: Apache-2.0
"""LLM Surgery in the small world: old biographies out, new ones in (2409.13054).

    python -m experiments.surgery.run \\
        --config=experiments/small/configs/biographies.py

The model knows made-up people. The biographies of some are to be removed and replaced
by fictitious ones of the same people, which contradict them; those of the others stay.
Multiple-choice questions of three options are asked about all three sets, in a wording
that was never trained on: the option with the highest mean log-probability of a token
counts. None of a question's options is the answer of another set. Chance is 1/3.

The paper's three claims are measured: accuracy on the unlearn set falls, on the update
set it rises, on the retain set it stays. Its weighted sum of ascent, NLL and KL runs
beside the same without KL, the same with tokens capped at ln V nats, and BLUR with the
new biographies in its upper level. Each runs at every rate of RATES on the first seed,
then on all seeds at the one where update + retain - unlearn accuracy is largest.

The baseline never saw the old biographies: the world's twin, trained on the new ones
and on those to keep for as many steps.

One line of JSON a run, in `<output>/<world>.surgery.jsonl`: stopped at any time, the
same command goes on. Writes results/surgery_small.json, .md and .png; --draw only that.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.comparison import run as compare
from experiments.small import biographies, methods, questions, score, unlearn, world
from experiments.surgery import figures as surgery_figures
from jaxunlearn import recipes
from jaxunlearn.data import table
from jaxunlearn.typing import Params

SETS = ("unlearn", "update", "retain")
OPTIONS = 3
RATES = (3e-4, 1e-3, 3e-3)
RESULTS = Path(__file__).resolve().parent / "results" / "small"
BASELINE = "baseline"

Build = Callable[..., recipes.Recipe]


class Plan(NamedTuple):
    """What is run, and how large; `asked` are questions of each set at most."""

    rates: Sequence[float] = RATES
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 30
    rows: int = 8
    asked: int = 64


def known(vocab: int) -> Mapping[str, Build]:
    """Name -> recipe of (model, learning_rate=)."""
    weighted, bilevel = recipes.surgery.weighted, recipes.surgery.bilevel
    return MappingProxyType(
        {
            "surgery": weighted,
            "surgery, ascent capped at ln V": partial(weighted, cap=math.log(vocab)),
            "without KL": partial(weighted, retain=0.0),
            "BLUR, update in the upper level": bilevel,
        }
    )


def tables(small: world.World) -> dict[str, table.Table]:
    """What the streams draw from: forget, update and retain rows with their answers.

    Raises:
        ValueError: if the world is not of made-up biographies.
    """
    source = small.about["config"]["facts"]["source"]
    if source != "biographies":
        raise ValueError(
            "small.surgery needs a world of biographies, as it makes new ones, got "
            f"{source!r}. Take experiments/small/configs/biographies.py."
        )
    new = biographies.fictitious(small.questions["forget"])
    encode = partial(questions.encode, small.tokenizer, length=small.about["length"])
    return {
        "forget": small.table("forget"),
        "update": encode(new),
        "retain": small.table("retain"),
    }


def choices(small: world.World, most: int) -> dict[str, table.Table]:
    """Set -> its questions' options, the right one first, one after another."""
    old = small.questions["forget"]
    rows = {"unlearn": old, "update": biographies.fictitious(old)}
    rows["retain"] = small.questions["retain"]
    found = {}
    for name, each in rows.items():
        each, asked, answers = list(each)[:most], [], []
        for row in each:
            wrong = row["perturbed_answer"][: OPTIONS - 1]
            answers += [row["paraphrased_answer"], *wrong]
            asked += [row] * OPTIONS
        found[name] = questions.encode(
            small.tokenizer, asked, answers, length=small.about["length"]
        )
    return found


def ask(
    small: world.World, params: Params, asked: Mapping[str, table.Table]
) -> dict[str, float]:
    """Set -> accuracy of its multiple-choice questions."""
    return {
        name: float(
            (score.chosen_options(small.model, params, options, OPTIONS) == 0).mean()
        )
        for name, options in asked.items()
    }


def run(
    small: world.World, file: Path, *, plan: Plan | None = None, progress: bool = False
) -> list[compare.Line]:
    """All lines of the experiment, those that `file` lacks run now and added to it.

    Raises:
        ValueError: if the file is of another world or plan, or the world not of
            biographies.
    """
    plan = Plan() if plan is None else plan
    lines = compare.read(file, compare.sizes(small, plan))
    streams, asked = tables(small), choices(small, plan.asked)
    if not file.exists():
        compare.add(file, compare.sizes(small, plan))
    bar = tqdm(disable=not progress, unit="run", dynamic_ncols=True, file=sys.stderr)

    def add(key, params, **about):
        lines.append({"key": key, **about, "accuracy": ask(small, params, asked)})
        compare.add(file, lines[-1])
        bar.update()

    def lacks(key):
        bar.set_postfix_str(key)
        return all(line["key"] != key for line in lines)

    sizes = dict(steps=plan.steps, batch_size=plan.rows)
    for name, params in (("before", small.params), ("twin", small.retrained)):
        if lacks(name):
            add(name, params, method=name)
    recipes_here = known(small.model.config.vocab)
    made: dict[str, unlearn.Runner] = {}

    def runner(name):
        if name not in made:
            build, start = recipes_here.get(name, _baseline), small
            if name == BASELINE:
                start = small._replace(params=small.retrained)
            method = methods.Method(name, 0.0, compare.at_rate(build))
            made[name] = unlearn.runner(start, method, streams, **sizes)
        return made[name]

    for seed in plan.seeds:
        for name in (BASELINE, *recipes_here):
            rates = plan.rates if seed == plan.seeds[0] else (best(lines, name, plan),)
            for rate in rates:
                key = f"{name} {rate:.3g} {seed}"
                if lacks(key):
                    params, about = unlearn.run(runner(name), rate=rate, seed=seed)
                    add(key, params, method=name, rate=rate, seed=seed, **about)
    bar.close()
    return lines


def best(lines: Sequence[compare.Line], name: str, plan: Plan) -> float:
    """The rate at which update + retain - unlearn accuracy is largest on the first
    seed, the lower of equals."""

    def balance(line):
        found = line["accuracy"]
        return found["update"] + found["retain"] - found["unlearn"]

    own = [
        line
        for line in lines
        if line["method"] == name and line.get("seed") == plan.seeds[0]
    ]
    return max(sorted(own, key=lambda line: line["rate"]), key=balance)["rate"]


def _baseline(model, *, learning_rate):
    streams = {"update": 1.0, "retain": 1.0}
    return recipes.finetune.nll(model, learning_rate=learning_rate, streams=streams)


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes surgery_small.json, .md and .png."""
    del argv
    config, plan = flags.FLAGS.config, Plan()
    try:
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.surgery.jsonl"
        if flags.FLAGS.draw:
            lines = compare.read(file, compare.sizes(small, plan))
        else:
            lines = run(small, file, plan=plan, progress=True)
        about = compare.sizes(small, plan) | compare.provenance(small)
        surgery_figures.write(lines, about, RESULTS)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
