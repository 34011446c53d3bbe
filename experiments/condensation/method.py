# SPDX-License-Identifier: Apache-2.0
"""Dataset-condensation-driven unlearning (2402.00195) of an image model.

1. `condense`: the training images become a few synthetic ones, offline, once a model.
2. `condensation`: the retain set is replaced by condensed images where a bucket lost
   rows, and the network's parts train on it in turns.

The paper's offline modular stage, which trains the network in parts before any request,
is left out here; `run.condensed` has it.
"""

import time

import numpy as np

from experiments.vision import world as worlds
from experiments.vision.world import Case, Result
from jaxunlearn import Frozen, fit_stages, recipes, synth, trees
from jaxunlearn.data import images, table
from jaxunlearn.models import vision
from jaxunlearn.recipes.condensation import STREAMS

MAX_STATISTICS = 5  # batches that statistics are measured on after a stage


def condense(case: Case):
    """(condensed images, buckets, CPU seconds), computed once for every seed."""
    if "condensed" not in case.shared:
        world, start = case.world, time.process_time()
        rows = worlds.features(world.model, case.params, world.train)
        count = world.config.train // world.config.bucket_size
        labels = images.labels_of(world.train)
        buckets = synth.kmeans_per_class(rows, labels, num_clusters=count, key=case.key)
        small = synth.condense(world.model, case.params, world.train, rows, buckets)
        case.shared["condensed"] = small, buckets, time.process_time() - start
    return case.shared["condensed"]


def condensation(case: Case) -> Result:
    """Unlearns with the reduced retain set, part after part."""
    world, config = case.world, case.world.config
    small, buckets, offline = condense(case)
    reduced = synth.reduce_retain(world.train, buckets, small, case.split.forget_rows)
    remembered = remembrance_set(world, case.split.retain)
    labels = images.labels_of(case.split.retain)
    nets = {part: world.part(part) for part in vision.PARTS}
    settings = dict(threshold=config.threshold)
    if len(np.unique(labels)) < 10:  # a class is forgotten; as released, `final` rests
        settings = dict(learning_rate=1e-3, middle_learning_rate=1e-3)
    plan = recipes.condensation.unlearn(nets, rounds=config.rounds, **settings)
    data = {"reduced": reduced.table, "kept": images.as_float(remembered)}
    sizes = {
        "reduced": min(config.batch_size, table.num_rows(reduced.table)),
        "kept": table.num_rows(remembered),
    }
    states, steps, batches = {}, {}, {}
    for part, recipe in plan.parts.items():
        made = recipe.setup(nets[part], case.params, key=case.key)
        steps[part], states[part], _ = made
        name = STREAMS[part]
        batches[part] = table.batch_fn({name: data[name]}, sizes[name], seed=case.seed)
    stages = plan.stages(worlds.steps_per_epoch(world, reduced.table))
    _, rest = trees.split(case.params, vision.TRAINABLE)

    def after(part, params, rest):
        new = worlds.with_statistics(
            world, params, reduced.table, nets[part], max_batches=MAX_STATISTICS
        )
        return trees.split(new, vision.TRAINABLE)[1]

    clock = worlds.Clock()
    states, frozen, _ = fit_stages(
        steps, states, batches, stages, Frozen(rest), hooks=[clock], after=after
    )
    params = frozen.params
    for state in states.values():
        params = trees.merge(params, state.params)
    about = {"ratio": reduced.ratio, "buckets": len(small.buckets)}
    return Result(params, clock.seconds(), offline, about)


def remembrance_set(world: worlds.World, retain: table.Table) -> table.Table:
    """The first few retained images of every class."""
    labels = images.labels_of(retain)
    count = world.config.remembered
    rows = [images.rows_of_class(labels, label, count) for label in np.unique(labels)]
    return table.select(retain, np.concatenate(rows))
