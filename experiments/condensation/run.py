# SPDX-License-Identifier: Apache-2.0
"""The condensation paper (2402.00195) on images: unlearning and three experiments.

    python -m experiments.condensation.run \\
        --config experiments/vision/configs/fashion.py

* unlearning: the comparison of experiments/vision, restricted to the original, the
  retrained and the condensation model; finished runs are shared with it.
* inversion: an attacker draws the forgotten class from a model. How near is the picture
  to a forgotten image, and to their mean (mean squared error of pixels)? Compared are
  the original, the unlearned and a retrained model.
* membership: the rows that the model has learned most firmly (overfitting metric at
  most Otsu's threshold) are forgotten. Does an attack by the loss then separate
  training rows from new rows less well?
* condensed: a model of encoder, decoder and classifier (models.vision, "translator")
  unlearns. Then a fresh classifier trains on a few retained images behind the other two
  parts, which are frozen. What does it know of the forget set, compared with a fresh
  classifier that was trained in the same way before unlearning?

--only NAMES runs some of the four. A stopped run resumes with the same command.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from experiments.condensation import figures
from experiments.condensation.method import condensation, remembrance_set
from experiments.shared import command, page
from experiments.shared.ledger import Ledger, Line
from experiments.vision import attacks as scoring
from experiments.vision import run as vision_run
from experiments.vision import world as worlds
from jaxunlearn import _checks, attacks, metrics, recipes
from jaxunlearn.data import images
from jaxunlearn.models import vision

FOLDER = Path(__file__).resolve().parent
ROUNDS = 2  # of the offline stage, each with a fresh classifier
Numbers = dict[str, dict[str, float]]


def otsu(values: np.ndarray) -> float:
    """The largest value of the lower group when [n] numbers are split in two.

    The split has the largest variance between the two groups (Otsu 1979).
    """
    rows = np.sort(np.asarray(values, np.float64))
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(f"otsu needs at least two finite numbers, got {values}.")
    low = np.arange(1, len(rows))
    sums = np.cumsum(rows)
    gap = sums[:-1] / low - (sums[-1] - sums[:-1]) / (len(rows) - low)
    between = low * (len(rows) - low) * gap**2
    between[rows[1:] == rows[:-1]] = -1.0  # equal values stay together
    return float(rows[np.argmax(between)])


def inversion(world: worlds.World, seed: int) -> Numbers:
    """Model -> how near a picture drawn from it is to what was forgotten."""
    case = _case(world, worlds.split(world, "class", seed), seed)
    retrained = worlds.train_from_scratch(world, case.split.retain, seed=seed + 100)
    models = {
        "original": case.params,
        "condensation": condensation(case).params,
        "retrained": retrained[0],
    }
    real = images.as_float(case.split.forget)["image"]
    label = int(images.labels_of(case.split.forget)[0])
    found = {}
    for name, params in models.items():
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
    params, _ = worlds.train_from_scratch(world, world.train, seed=seed)
    firmness = scoring.overfitting(world, params, world.train)
    labels = images.labels_of(world.train)
    rows = firmly_learned(labels, firmness, world.config.remembered)
    split = images.split_rows(world.train, rows)
    case = worlds.Case(world, split, params, seed, {})
    found = {}
    models = {"original": params, "defended": condensation(case).params}
    for name, each in models.items():
        train, new = (scoring.scores(world, each, x) for x in (world.train, world.test))
        found[name] = {
            "AUC": metrics.auc(train["loss"], new["loss"]),
            "train": float(train["right"].mean()),
            "test": float(new["right"].mean()),
            "forgotten share": len(rows) / len(firmness),
        }
    return found


def firmly_learned(
    labels: np.ndarray, values: np.ndarray, num_spared: int
) -> np.ndarray:
    """Rows whose value is at most Otsu's threshold.

    The `num_spared` rows of every class with the largest values are never among them.
    """
    chosen = values <= otsu(values)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[np.argsort(values[rows])][-num_spared:]] = False
    return np.flatnonzero(chosen)


def condensed(world: worlds.World, seed: int) -> Numbers:
    """A fresh classifier before and after unlearning -> accuracies, M1."""
    small = with_translator(world)
    split = worlds.split(small, "random", seed)
    remembered = remembrance_set(small, split.retain)
    nets = {name: small.part(name) for name in ("middle", "final")}
    plan = recipes.condensation.offline(
        nets, learning_rate=1e-3, middle_learning_rate=1e-3
    )

    def train(params, part, rows, epochs):
        recipe = plan.parts[part]
        (stream,) = recipe.terms["retain"].reads
        return worlds.train(
            small,
            recipe.terms,
            recipe.tx,
            params,
            {stream: rows},
            steps=epochs * worlds.steps_per_epoch(world, rows),
            seed=seed,
            trainable=recipe.trainable,
        )[0]

    def with_fresh_classifier(params, number):
        new = small.model.init(jax.random.key(1000 * (seed + 1) + number))["final"]
        return {**params, "final": new}

    epochs = world.config.tune_epochs
    case = _case(small, split, seed)
    params = case.params
    for number in range(ROUNDS):
        params = with_fresh_classifier(params, number)
        params = train(params, "final", remembered, epochs)
        params = train(params, "middle", small.train, epochs)
    case = case._replace(params=params)
    found = {}
    for name, each in {"before": params, "after": condensation(case).params}.items():
        each = with_fresh_classifier(each, ROUNDS)
        each = train(each, "final", remembered, 5 * epochs)
        sets = {"retain": split.retain, "forget": split.forget, "test": small.test}
        scores = {key: scoring.scores(small, each, rows) for key, rows in sets.items()}
        found[name] = {key: float(x["right"].mean()) for key, x in scores.items()}
        pair = (scores[key]["loss"] for key in ("forget", "test"))
        found[name]["M1"] = metrics.attack_accuracy(*pair, key=jax.random.key(seed))
    return found


def with_translator(world: worlds.World) -> worlds.World:
    """The world with the paper's condensed model, images padded to sides of 8."""
    sides = world.model.config.shape[:2]
    pads = [(0, 0), *((0, -side % 8) for side in sides), (0, 0)]
    train, test = (
        {**rows, "image": np.pad(rows["image"], pads)}
        for rows in (world.train, world.test)
    )
    net = dataclasses.replace(
        world.model.config, family="translator", shape=train["image"].shape[1:]
    )
    return dataclasses.replace(world, model=vision.make(net), train=train, test=test)


def _case(world, split, seed) -> worlds.Case:
    params, _ = worlds.train_from_scratch(world, world.train, seed=seed)
    return worlds.Case(world, split, params, seed, {})


EXPERIMENTS: Mapping[str, Callable[[worlds.World, int], Numbers]] = {
    "inversion": inversion,
    "membership": membership,
    "condensed": condensed,
}


def experiments(
    world: worlds.World, ledger: Ledger, names: tuple[str, ...] = tuple(EXPERIMENTS)
) -> list[Line]:
    """All lines of the ledger, the missing ones run now."""
    for seed in world.config.seeds:
        for name in names:
            key = f"{name} {seed}"
            if ledger.lacks(key):
                numbers = EXPERIMENTS[name](world, seed)
                ledger.add(
                    {"key": key, "experiment": name, "seed": seed, "models": numbers}
                )
    return ledger.lines


def run(arguments: command.Arguments) -> None:
    """Runs what is missing, then writes the results and the page."""
    config, options = arguments.config, arguments.options
    names = options.only.split(",") if options.only else ["unlearning", *EXPERIMENTS]
    for name in names:
        _checks.one_of("--only", ["unlearning", *EXPERIMENTS], experiment=name)
    if not options.draw and "unlearning" in names:
        options.only, options.results = "retrained,condensation", vision_run.FOLDER
        vision_run.run(arguments)
    names = tuple(name for name in names if name in EXPERIMENTS)
    if not options.draw and names:
        name = f"{config.name}.condensation.jsonl"
        ledger = vision_run.open_ledger(config, name)
        lines = experiments(worlds.make(config), ledger, names)
        about = ledger.head["config"]
        about = {k: v for k, v in about.items() if k not in ("output", "folder")}
        content = {"about": {"config": about, "jax": jax.__version__}, "runs": lines}
        page.write_json(FOLDER / "results" / f"{config.name}.json", content)
    draw(FOLDER)


def draw(folder: Path) -> None:
    """Writes README.md from these results and those of experiments/vision."""
    results = {
        "vision": page.results(vision_run.FOLDER),
        "condensation": page.results(FOLDER),
    }
    page.write_text(Path(folder) / "README.md", page.readme(figures.readme, results))


if __name__ == "__main__":
    command.main(
        run,
        __doc__,
        config=vision_run.CONFIG,
        options={k: v for k, v in vision_run.OPTIONS.items() if k != "--results"},
    )
