# SPDX-License-Identifier: Apache-2.0
"""What condensation's paper does beside forgetting (2402.00195): three experiments.

    python -m experiments.condensation.defend --config=experiments/vision/configs/fashion.py

* inversion: an attacker draws the forgotten class from the model. How near is the
  picture to a forgotten image, and to their mean (mean squared error of pixels): of the
  original model, after condensation unlearned the class, and of a retrained one;
* membership: the rows that the model holds most firmly, of which the overfitting metric
  is at most Otsu's threshold, are forgotten. Does an attack by the loss tell training
  rows from new ones less well then?
* condensed: a model of encoder, decoder and classifier (models.vision, "translator")
  forgets; then a new classifier of fresh weights learns from a few kept images through
  the other two, which stand still. What does it know of the forgotten rows, beside one
  that learned so before unlearning?

Data, networks and unlearning are those of experiments/vision. One line of JSON an
experiment and seed, in `<output>/<name>.defend.jsonl`: stopped at any time, the same
command goes on. Writes results/defend_<name>.json and .md.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.comparison.run import Line, add, read
from experiments.vision import attacks as judges
from experiments.vision import methods
from experiments.vision import world as worlds
from experiments.vision.figures import command
from jaxunlearn import attacks, metrics, recipes
from jaxunlearn.data import images, table
from jaxunlearn.io import log
from jaxunlearn.models import vision

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 2  # of the offline stage, each with a fresh classifier
Numbers = dict[str, dict[str, float]]


def otsu(values: np.ndarray) -> float:
    """The value v that best cuts [n] numbers into those at most v and those above it:
    the largest variance between the two (Otsu 1979)."""
    rows = np.sort(np.asarray(values, np.float64))
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(f"otsu needs two finite numbers at least, got {values}.")
    low = np.arange(1, len(rows))
    sums = np.cumsum(rows)
    gap = sums[:-1] / low - (sums[-1] - sums[:-1]) / (len(rows) - low)
    between = low * (len(rows) - low) * gap**2
    between[rows[1:] == rows[:-1]] = -1.0  # equal values stay together
    return float(rows[np.argmax(between)])


def inversion(world: worlds.World, seed: int) -> Numbers:
    """Model -> how near a picture drawn from it is to what was forgotten."""
    case = _case(world, worlds.split(world, "class", seed), seed)
    models = {
        "original": case.params,
        "condensation": methods.condensed(case).params,
        "retrained": methods.retrain(case).params,
    }
    real = images.as_float(case.split.forget)["image"]
    found = {}
    for name, params in models.items():
        label = int(images.labels_of(case.split.forget)[0])
        drawn, loss = attacks.invert_classes(
            world.model, params, [label], real.shape[1:]
        )
        found[name] = {
            "to the nearest": float(((real - drawn) ** 2).mean((1, 2, 3)).min()),
            "to the mean": float(((real.mean(0) - drawn[0]) ** 2).mean()),
            "loss": float(loss[0]),
        }
    return found


def membership(world: worlds.World, seed: int) -> Numbers:
    """Model -> AUC of the loss, training rows against new ones, and accuracies."""
    params, _ = worlds.original(world, world.train, seed=seed)
    each = judges.overfitting(world, params, world.train)
    rows = held(images.labels_of(world.train), each, world.config.kept)
    split = images.split_rows(world.train, rows)
    case = methods.Case(world, split, params, seed, {})
    found = {}
    models = {"original": params, "defended": methods.condensed(case).params}
    for name, own in models.items():
        train, new = (judges.scores(world, own, x) for x in (world.train, world.test))
        found[name] = {
            "AUC": metrics.auc(train["loss"], new["loss"]),
            "train": float(train["right"].mean()),
            "test": float(new["right"].mean()),
            "forgotten share": len(rows) / len(each),
        }
    return found


def held(labels: np.ndarray, each: np.ndarray, kept: int) -> np.ndarray:
    """Rows whose value is at most Otsu's threshold; `kept` rows of every class, those
    of the largest values, are never among them."""
    chosen = each <= otsu(each)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        chosen[own[np.argsort(each[own])][-kept:]] = False
    return np.flatnonzero(chosen)


def condensed(world: worlds.World, seed: int) -> Numbers:
    """New classifier, before and after unlearning -> accuracies, M1."""
    small = translated(world)
    split = worlds.split(small, "random", seed)
    labels = images.labels_of(split.retain)
    rows = [
        images.rows_of_class(labels, c, world.config.kept) for c in np.unique(labels)
    ]
    kept = table.select(split.retain, np.concatenate(rows))
    nets = {name: small.part(name) for name in ("middle", "final")}
    plan = recipes.condensation.offline(nets, learning_rate=1e-3, lr_middle=1e-3)

    def train(params, part, rows, epochs):
        recipe = plan.parts[part]
        (stream,) = recipe.terms["retain"].reads
        steps = epochs * worlds.epoch(world, rows)
        params, _ = worlds.train(
            small,
            recipe.terms,
            recipe.tx,
            params,
            {stream: rows},
            steps=steps,
            seed=seed,
            trainable=recipe.trainable,
        )
        return params

    def fresh(params, number):
        new = small.model.init(jax.random.key(1000 * (seed + 1) + number))["final"]
        return {**params, "final": new}

    epochs = world.config.tune
    case = _case(small, split, seed)
    params = case.params
    for number in range(ROUNDS):
        params = train(fresh(params, number), "final", kept, epochs)
        params = train(params, "middle", small.train, epochs)
    case = case._replace(params=params)
    found = {}
    models = {"before": params, "after": methods.condensed(case).params}
    for name, own in models.items():
        own = train(fresh(own, ROUNDS), "final", kept, 5 * epochs)
        sets = {"retain": split.retain, "forget": split.forget, "test": small.test}
        each = {key: judges.scores(small, own, rows) for key, rows in sets.items()}
        found[name] = {key: float(x["right"].mean()) for key, x in each.items()}
        pair = (each[key]["loss"] for key in ("forget", "test"))
        found[name]["M1"] = metrics.attack_accuracy(*pair, key=jax.random.key(seed))
    return found


def translated(world: worlds.World) -> worlds.World:
    """The world with the paper's condensed model, its images padded to sides of 8."""
    sides = world.model.config.shape[:2]
    pads = [(0, 0), *((0, -side % 8) for side in sides), (0, 0)]

    def wide(rows):
        return {**rows, "image": np.pad(rows["image"], pads)}

    train, test = wide(world.train), wide(world.test)
    net = dataclasses.replace(
        world.model.config, family="translator", shape=train["image"].shape[1:]
    )
    return dataclasses.replace(world, model=vision.make(net), train=train, test=test)


EXPERIMENTS: Mapping[str, Callable[[worlds.World, int], Numbers]] = MappingProxyType(
    {"inversion": inversion, "membership": membership, "condensed": condensed}
)


def run(world: worlds.World, file: Path) -> list[Line]:
    """All lines, those that `file` lacks run now and added to it.

    Raises:
        ValueError: if the file is of another config.
    """
    config = json.loads(world.config.to_json())
    head = {"key": "head", "config": config}
    lines = read(file, head)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        add(file, head)
    done = {line["key"] for line in lines}
    for seed in world.config.seeds:
        for name, experiment in EXPERIMENTS.items():
            key = f"{name} {seed}"
            if key not in done:
                about = {"key": key, "experiment": name, "seed": seed}
                lines.append(about | {"models": experiment(world, seed)})
                add(file, lines[-1])
                print(key, file=sys.stderr, flush=True)
    return lines


def write(lines: Sequence[Line], config: Any, place: Path) -> None:
    """`place`.json with every line, `place`.md with a table an experiment."""
    plain = json.loads(config.to_json())
    settings = {k: v for k, v in plain.items() if k not in ("output", "folder")}
    about = {"config": settings, "jax": jax.__version__}
    whole = json.dumps(log.plain({"about": about, "runs": list(lines)}), indent=1)
    place.with_suffix(".json").write_text(whole + "\n", encoding="utf-8")
    page = [f"# Condensed models and two defences: {config.name}", ""]
    page += [
        f"Written by `{command('defend', config)}` "
        f"with {config.train} training and {config.test} test images a class, "
        f"{config.family} of width {config.width}. Mean over seeds; see "
        "`experiments/condensation/defend.py` for what runs. Errors are mean squared ones of pixels "
        "in [0, 1]; AUC and M1 are 0.5 where nothing is told."
    ]
    for name in EXPERIMENTS:
        own = [line["models"] for line in lines if line["experiment"] == name]
        if own:
            columns = list(next(iter(own[0].values())))
            count = f"{len(own)} seed{'s' * (len(own) > 1)}"
            page += ["", f"## {name.capitalize()} ({count})", ""]
            page += [
                f"| model | {' | '.join(columns)} |",
                "| --- " * len(columns) + "| --- |",
            ]
            for model in own[0]:
                each = [[x[model][c] for x in own] for c in columns]
                page.append(f"| {model} | {' | '.join(map(_spread, each))} |")
            page += ["", TOLD[name](own)]
    place.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")


def _spread(values: Sequence[float]) -> str:
    text = f"{np.mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.3f}"


def _means(own: Sequence[Numbers], name: str) -> dict[str, float]:
    """Model -> the mean of one number over seeds."""
    return {model: float(np.mean([x[model][name] for x in own])) for model in own[0]}


def _inverted(own: Sequence[Numbers]) -> str:
    near = _means(own, "to the nearest")
    order = sorted(near, key=near.get)
    words = ", ".join(f"{name} ({near[name]:.3f})" for name in order)
    better = near["condensation"] > near["original"]
    return (
        f"Nearest to a forgotten image are the pictures drawn from: {words}. So "
        f"unlearning {'makes' if better else 'does **not** make'} them less like the "
        "forgotten ones."
    )


def _protected(own: Sequence[Numbers]) -> str:
    auc, test = _means(own, "AUC"), _means(own, "test")
    gain, lost = auc["original"] - auc["defended"], test["original"] - test["defended"]
    return (
        f"Forgetting them takes {gain:+.3f} off the attack's AUC and {100 * lost:+.1f} "
        "points off the accuracy on new images."
    )


def _relearned(own: Sequence[Numbers]) -> str:
    gap = {
        model: np.mean([x[model]["forget"] - x[model]["test"] for x in own])
        for model in own[0]
    }
    return (
        "A new classifier is right on forgotten images more often than on new ones by "
        f"{100 * gap['before']:.1f} points before and {100 * gap['after']:.1f} after "
        "unlearning."
    )


TOLD: Mapping[str, Callable[[Sequence[Numbers]], str]] = MappingProxyType(
    {"inversion": _inverted, "membership": _protected, "condensed": _relearned}
)


def _case(world, split, seed) -> methods.Case:
    params, _ = worlds.original(world, world.train, seed=seed)
    return methods.Case(world, split, params, seed, {})


def main(argv: Sequence[str]) -> None:
    """Runs what is missing and writes the results."""
    del argv
    config = flags.FLAGS.config
    place = RESULTS / f"defend_{config.name}"
    try:
        file = Path(config.output).expanduser() / f"{config.name}.defend.jsonl"
        write(run(worlds.make(config), file), config, place)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"Wrote {place}.json and .md")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/vision")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
