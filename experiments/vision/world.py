# SPDX-License-Identifier: Apache-2.0
"""Data, a network, and one way to train it, for all of experiments/vision."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import jaxunlearn as ju
from jaxunlearn import recipes, trees
from jaxunlearn.data import image_sets, images, table
from jaxunlearn.models import vision
from jaxunlearn.typing import Model, Params, Term


def defaults() -> ConfigDict:
    """The settings of a comparison."""
    c = ConfigDict()
    c.name = "fashion_mnist"
    c.folder = ""  # "" takes JAXUNLEARN_DATA
    c.train, c.test = 100, 100  # images a class
    c.family, c.width = "cnn", 0.25
    c.epochs, c.batch, c.learning_rate = (
        12,
        50,
        2e-3,
    )  # of the original and of retraining
    c.tune = 4  # epochs of methods that train on
    c.fraction, c.forget_class = 0.1, 2
    c.settings = ("random", "class")
    c.seeds = (0, 1, 2)
    c.per_bucket = 10  # images a condensed image stands for, on average
    c.rounds, c.threshold = 10, 8  # of condensation; released: 30 and 25
    c.kept = 10  # images a class in the remembrance set
    c.gan_steps, c.gan_batch = 300, 16
    c.pictures = True
    c.output = "runs/vision"
    return c


@dataclasses.dataclass(frozen=True)
class World:
    """Data and a network that fits it.

    Attributes:
        config: of the comparison.
        model: the network; `part` gives those whose one part trains.
        train, test: tables of images, uint8.
    """

    config: ConfigDict
    model: Model
    train: table.Table
    test: table.Table

    def part(self, part: str) -> Model:
        return vision.make(self.model.config, train_parts=(part,))


def make(config: ConfigDict) -> World:
    """Reads the data and describes the network."""
    folder = config.folder or None
    train, test = (
        image_sets.read(config.name, split, folder, per_class=config[split])
        for split in image_sets.SPLITS
    )
    pixels = train["image"].astype(np.float32) / 255
    net = vision.VisionConfig(
        config.family,
        shape=train["image"].shape[1:],
        width=config.width,
        mean=tuple(pixels.mean((0, 1, 2)).tolist()),
        std=tuple(pixels.std((0, 1, 2)).tolist()),
    )
    return World(config, vision.make(net), train, test)


def split(world: World, setting: str, seed: int) -> images.Split:
    """What is forgotten: images at random, or a whole class."""
    if setting == "class":
        return images.split_class(world.train, world.config.forget_class)
    return images.split_random(world.train, world.config.fraction, seed=seed)


def epoch(world: World, rows: table.Table) -> int:
    """Updates that see every row once."""
    return -(-table.num_rows(rows) // world.config.batch)


def train(
    world: World,
    terms: Mapping[str, Term],
    tx: Any,
    params: Params,
    streams: Mapping[str, table.Table],
    *,
    steps: int,
    seed: int,
    ref: Any = None,
    kept: table.Table | None = None,
    batch: int = 0,
    trainable: str = vision.TRAINABLE,
    opt_state: Any = None,
) -> tuple[Params, float]:
    """Params after so many steps, statistics measured on `kept`, and CPU seconds; from
    the optimizer's state `opt_state` if there is one.

    Seconds are those of all cores for the steps, as wall time says nothing on a shared
    machine; the first step, which compiles, counts as the mean of the others.
    """
    half, rest = trees.split(params, trainable)
    state = ju.init_state(half, tx, jax.random.key(seed))
    if opt_state is not None:
        state = state.replace(opt_state=opt_state)
    step = jax.jit(ju.make_step(terms, tx), donate_argnums=0)
    size = min([batch or world.config.batch, *map(table.rows, streams.values())])
    loader = table.streams(streams, size, seed=seed)
    clock = Clock()
    frozen = ju.Frozen(rest, ref)
    state, _ = ju.fit(step, state, loader, frozen, steps=steps, hooks=[clock])
    params = trees.merge(state.params, rest)
    if kept is not None:
        params = measured(world, params, kept)
    return params, clock.seconds()


class Clock:
    """A hook for fit that counts CPU seconds of steps, runs of them apart."""

    def __init__(self):
        self.runs: list[list[float]] = []
        self.part: tuple[str, ...] = ()

    def __call__(self, state, entry) -> None:
        part = tuple(trees.paths(state.params))
        if part != self.part or entry["step"] == 0:
            self.part = part
            self.runs.append([])
        self.runs[-1].append(time.process_time())

    def seconds(self) -> float:
        """Of all runs; the first step of each counts as the mean of its others."""
        return sum(
            (run[-1] - run[0]) * len(run) / max(1, len(run) - 1) for run in self.runs
        )


def measured(
    world: World,
    params: Params,
    rows: table.Table,
    model: Model | None = None,
    *,
    most: int | None = None,
) -> Params:
    """Params with statistics of batch normalisation of these rows, or of `most` batches
    drawn from them: tables may be sorted by class."""
    count = table.num_rows(rows)
    size = min(world.config.batch, count)
    full = min(count // size, most or count)
    order = np.arange(count) if most is None else _shuffled(count)
    batches = (
        table.select(rows, order[i * size : (i + 1) * size]) for i in range(full)
    )
    return vision.with_batch_stats(model or world.model, params, batches)


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


def original(world: World, rows: table.Table, *, seed: int) -> tuple[Params, float]:
    """A network trained from scratch on these rows."""
    config = world.config
    recipe = recipes.finetune.nll(
        world.model, learning_rate=config.learning_rate, clip=None
    )
    return train(
        world,
        recipe.terms,
        recipe.tx,
        world.model.init(jax.random.key(seed)),
        {"train": rows},
        steps=config.epochs * epoch(world, rows),
        seed=seed,
        kept=rows,
    )


def logits(model: Model, params: Params, rows: table.Table) -> np.ndarray:
    """[n, C] float32, the model as it is used."""
    found = []
    for batch in table.eval_batches({"image": rows["image"]}, 500):
        out = _logits(params, batch["image"], model)
        found.append(np.asarray(out)[batch["valid"]])
    return np.concatenate(found)


def features(model: Model, params: Params, rows: table.Table) -> np.ndarray:
    """[n, D] float32, what the head reads."""
    found = []
    for batch in table.eval_batches({"image": rows["image"]}, 500):
        out = _features(params, batch["image"], model)
        found.append(np.asarray(out)[batch["valid"]])
    return np.concatenate(found)


def _features_of(params, image, model):
    return vision.features(model, params, {"image": image})


def _logits_of(params, image, model):
    return model.unembed(params, _features_of(params, image, model)).astype(jnp.float32)


_features = jax.jit(_features_of, static_argnums=2)
_logits = jax.jit(_logits_of, static_argnums=2)
