# SPDX-License-Identifier: Apache-2.0
"""Data, a network, and one way to train it, for every experiment on images."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import jaxunlearn as ju
from jaxunlearn import evaluate, recipes, trees
from jaxunlearn.data import image_sets, images, table
from jaxunlearn.models import vision
from jaxunlearn.recipes import Recipe
from jaxunlearn.typing import Model, Params, Term


def defaults() -> ConfigDict:
    """The settings of a comparison."""
    c = ConfigDict()
    c.name = "fashion_mnist"
    c.folder = ""  # "" takes JAXUNLEARN_DATA
    c.train, c.test = 100, 100  # images a class
    c.family, c.width = "cnn", 0.25
    # Of the original and of the retrained model.
    c.epochs, c.batch_size, c.learning_rate = 12, 50, 2e-3
    c.tune_epochs = 4  # of methods that train further
    c.fraction, c.forget_class = 0.1, 2
    c.settings = ("random", "class")
    c.seeds = (0, 1, 2)
    c.bucket_size = 10  # images that a condensed image stands for, on average
    c.rounds, c.threshold = 10, 8  # of condensation; released: 30 and 25
    c.remembered = 10  # images a class in the remembrance set
    c.gan_steps, c.gan_batch = 300, 16
    c.pictures = True
    c.output = "runs/vision"
    return c


@dataclasses.dataclass(frozen=True)
class World:
    """Data and a network that fits it.

    Attributes:
        config: of the comparison.
        model: the network.
        train, test: tables of images, uint8.
    """

    config: ConfigDict
    model: Model
    train: table.Table
    test: table.Table

    def part(self, part: str) -> Model:
        """The same network, of which one part trains."""
        return vision.make(self.model.config, train_parts=(part,))


class Case(NamedTuple):
    """One unlearning request.

    Attributes:
        world, split: data, network, and what is forgotten.
        params: the original model.
        seed: of everything that is drawn.
        shared: results that several methods of a seed use, such as "condensed".
    """

    world: World
    split: images.Split
    params: Params
    seed: int
    shared: dict[str, Any]

    @property
    def key(self):
        return jax.random.key(self.seed)

    @property
    def steps(self) -> int:
        """Steps of a method that trains further."""
        epochs = self.world.config.tune_epochs
        return epochs * steps_per_epoch(self.world, self.split.retain)


class Result(NamedTuple):
    """Params, CPU seconds of forgetting, and of the work before it (`offline`)."""

    params: Params
    seconds: float
    offline: float = 0.0
    about: Mapping[str, Any] = {}


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
    """What is forgotten: images at random, or a class."""
    if setting == "class":
        return images.split_class(world.train, world.config.forget_class)
    return images.split_random(world.train, world.config.fraction, seed=seed)


def steps_per_epoch(world: World, rows: table.Table) -> int:
    """Updates that see every row once."""
    return -(-table.num_rows(rows) // world.config.batch_size)


def train(
    world: World,
    terms: Mapping[str, Term],
    tx: Any,
    params: Params,
    streams: Mapping[str, table.Table],
    *,
    steps: int,
    seed: int,
    ref_params: Any = None,
    statistics: table.Table | None = None,
    trainable: str = vision.TRAINABLE,
    opt_state: Any = None,
) -> tuple[Params, float]:
    """(params after `steps` updates, CPU seconds).

    The seconds are those of all cores for the steps, because wall time means little on
    a shared machine. The first step, which compiles, counts as the mean of the others.

    Args:
        world: data and network.
        terms, tx: the losses and the optimizer chain.
        params: before the first update.
        streams: name -> rows.
        steps: number of updates.
        seed: of the order of rows and of dropout.
        ref_params: of the reference model, if a term needs it.
        statistics: rows on which batch normalisation is measured afterwards.
        trainable: pattern of the leaves that train.
        opt_state: to start from, instead of a fresh one.
    """
    half, rest = trees.split(params, trainable)
    state = ju.init_state(half, tx, jax.random.key(seed))
    if opt_state is not None:
        state = state.replace(opt_state=opt_state)
    step = jax.jit(ju.make_step(terms, tx), donate_argnums=0)
    size = min([world.config.batch_size, *map(table.num_rows, streams.values())])
    loader = table.streams(streams, size, seed=seed)
    clock, frozen = Clock(), ju.Frozen(rest, ref_params)
    state, _ = ju.fit(step, state, loader, frozen, steps=steps, hooks=[clock])
    params = trees.merge(state.params, rest)
    if statistics is not None:
        params = with_statistics(world, params, statistics)
    return params, clock.seconds()


def unlearn(
    case: Case,
    recipe: Recipe,
    streams: Mapping[str, table.Table],
    *,
    steps: int = 0,
    **more: Any,
) -> Result:
    """Trains the case's model further with a recipe.

    Args:
        case: data, original model and seed.
        recipe: the losses and the optimizer chain.
        streams: name -> rows.
        steps: number of updates, `case.steps` if 0.
        more: for `train`.
    """
    streams = dict(streams)
    if any("ref_logps" in getattr(t, "columns", ()) for t in recipe.terms.values()):
        streams["forget"] = evaluate.reference_logps(
            case.world.model, case.params, streams["forget"], batch_size=100
        )
    params, seconds = train(
        case.world,
        recipe.terms,
        recipe.tx,
        case.params,
        streams,
        steps=steps or case.steps,
        seed=case.seed,
        statistics=case.split.retain,
        **more,
    )
    return Result(params, seconds)


class Clock:
    """A hook for fit that counts the CPU seconds of steps.

    A change of the part that trains begins a new phase, whose first step compiles.
    """

    def __init__(self):
        self.phases: list[list[float]] = []
        self.part: tuple[str, ...] = ()

    def __call__(self, state, entry) -> None:
        part = tuple(trees.paths(state.params))
        if part != self.part or entry["step"] == 0:
            self.part = part
            self.phases.append([])
        self.phases[-1].append(time.process_time())

    def seconds(self) -> float:
        """Of all phases; the first step of each counts as the mean of its others."""
        return sum(
            (times[-1] - times[0]) * len(times) / max(1, len(times) - 1)
            for times in self.phases
        )


def with_statistics(
    world: World,
    params: Params,
    rows: table.Table,
    model: Model | None = None,
    *,
    max_batches: int | None = None,
) -> Params:
    """Params with the statistics of batch normalisation measured on these rows.

    With `max_batches` only so many batches are used, drawn at random because a table
    may be sorted by class.
    """
    count = table.num_rows(rows)
    size = min(world.config.batch_size, count)
    full = min(count // size, max_batches or count)
    order = np.arange(count)
    if max_batches is not None:
        order = np.random.default_rng(0).permutation(count)
    batches = (
        table.select(rows, order[i * size : (i + 1) * size]) for i in range(full)
    )
    return vision.with_batch_stats(model or world.model, params, batches)


def train_from_scratch(
    world: World, rows: table.Table, *, seed: int
) -> tuple[Params, float]:
    """(a network trained on these rows alone, CPU seconds)."""
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
        steps=config.epochs * steps_per_epoch(world, rows),
        seed=seed,
        statistics=rows,
    )


def logits(model: Model, params: Params, rows: table.Table) -> np.ndarray:
    """[n, C] float32."""
    return _over(_logits, model, params, rows)


def features(model: Model, params: Params, rows: table.Table) -> np.ndarray:
    """[n, D] float32, the input of the last layer."""
    return _over(_features, model, params, rows)


def _over(function, model, params, rows):
    found = []
    for batch in table.eval_batches({"image": rows["image"]}, 500):
        out = function(params, batch["image"], model)
        found.append(np.asarray(out)[batch["valid"]])
    return np.concatenate(found)


def _features_of(params, image, model):
    return vision.features(model, params, {"image": image})


def _logits_of(params, image, model):
    return model.unembed(params, _features_of(params, image, model)).astype(jnp.float32)


_features = jax.jit(_features_of, static_argnums=2)
_logits = jax.jit(_logits_of, static_argnums=2)
