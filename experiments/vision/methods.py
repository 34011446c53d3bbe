# SPDX-License-Identifier: Apache-2.0
"""Ways to forget, each a composition of parts that language models use too.

Condensation and multi-GAN, the methods of two papers, are in experiments/condensation
and experiments/multi_gan.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from experiments.condensation.method import condensation
from experiments.multi_gan.method import multi_gan, without_images
from experiments.vision import world as worlds
from experiments.vision.world import Case, Result, unlearn
from jaxunlearn import (
    Frozen,
    combine,
    edits,
    init_state,
    losses,
    make_step,
    recipes,
    stats,
    synth,
    terms,
    trees,
)
from jaxunlearn.data import images, table
from jaxunlearn.models import vision
from jaxunlearn.typing import Params

RULE = "random_wrong"  # how labels of forget images are replaced


def retrain(case: Case) -> Result:
    """From scratch, without the rows to forget: the reference."""
    return Result(
        *worlds.train_from_scratch(case.world, case.split.retain, seed=case.seed + 100)
    )


def finetune(case: Case) -> Result:
    """Further training on the retain set."""
    recipe = recipes.finetune.nll(
        case.world.model, learning_rate=1e-3, streams={"retain": 1.0}
    )
    return unlearn(case, recipe, {"retain": case.split.retain})


def ascent(case: Case) -> Result:
    """A few steps of gradient ascent on the forget set."""
    recipe = recipes.openunlearning.ascent(case.world.model, learning_rate=1e-4)
    return unlearn(case, recipe, {"forget": case.split.forget}, steps=10)


def random_labels(case: Case) -> Result:
    """Training on wrong labels for the forget set and right ones for the retain set."""
    both = {"forget": 1.0, "retain": 1.0}
    recipe = recipes.finetune.nll(case.world.model, learning_rate=1e-3, streams=both)
    return unlearn(case, recipe, _relabelled(case))


def salun(case: Case) -> Result:
    """SalUn: random labels, moving only the half of the weights that is most salient.

    Saliency is the gradient of the loss of all forget rows with their right labels.
    """
    model = case.world.model
    parts = {k: terms.on_logps(losses.nll, model, k) for k in ("forget", "retain")}
    inner = optax.chain(combine.weighted_sum(), optax.adam(1e-3))
    tx = combine.saliency(inner, percentile=50.0, unit="weight", refresh="once")
    half, rest = trees.split(case.params, vision.TRAINABLE)
    state, start = init_state(half, tx, case.key), time.process_time()
    # One step on all forget rows computes the mask; its update is thrown away.
    rows = {"forget": case.split.forget, "retain": case.split.forget}
    marked, _ = jax.jit(make_step(parts, tx))(state, rows, Frozen(rest, None))
    marked = marked.opt_state._replace(inner=state.opt_state.inner)
    jax.block_until_ready(marked)
    offline = time.process_time() - start
    recipe = recipes.Recipe(parts, tx)
    result = unlearn(case, recipe, _relabelled(case), opt_state=marked)
    return result._replace(offline=offline)


def dampening(case: Case) -> Result:
    """SSD: weights that matter to the forget set shrink; nothing is trained."""
    model, start = case.world.model, time.process_time()
    half, rest = trees.split(case.params, vision.TRAINABLE)
    term = _WithConstants(terms.on_logps(losses.nll, model, "rows"), rest)
    size = case.world.config.batch_size

    def importance(rows):
        count = table.num_rows(rows)
        batches = [
            {"rows": table.select(rows, np.arange(i * size, (i + 1) * size) % count)}
            for i in range(max(1, count // size))
        ]
        return stats.fisher(term, half, batches, case.key, microbatch_size=size)

    new = edits.dampen(
        half,
        forget=importance(case.split.forget),
        all_data=importance(case.world.train),
    )
    seconds = time.process_time() - start
    params = trees.merge(new, rest)
    return Result(
        worlds.with_statistics(case.world, params, case.split.retain), seconds
    )


def blur(case: Case) -> Result:
    """BLUR with NPO as the lower and cross-entropy as the upper objective."""
    recipe = recipes.blur.npo(
        case.world.model, gamma=1.0, learning_rate=1e-3, weight_decay=0.0
    )
    return unlearn(case, recipe, _both(case))


def bad_teacher(case: Case) -> Result:
    """Distils a random network on the forget set, the original on the retain set."""
    model = case.world.model
    teachers = {"retain": case.params, "forget": model.init(jax.random.key(999))}
    parts = {
        name: _Distilled(terms.on_tokens(losses.kl, model, name), name)
        for name in ("forget", "retain")
    }
    tx = optax.chain(combine.weighted_sum(), optax.adam(1e-3))
    recipe = recipes.Recipe(parts, tx)
    return unlearn(case, recipe, _both(case), ref_params=teachers)


METHODS: dict[str, Callable[[Case], Result]] = {
    "retrained": retrain,
    "finetune": finetune,
    "condensation": condensation,
    "multi-GAN": multi_gan,
    "multi-GAN without images": without_images,
    "SalUn": salun,
    "SSD": dampening,
    "BLUR": blur,
    "random labels": random_labels,
    "ascent": ascent,
    "bad teacher": bad_teacher,
}


def _both(case: Case) -> dict[str, table.Table]:
    return {"forget": case.split.forget, "retain": case.split.retain}


def _relabelled(case: Case) -> dict[str, table.Table]:
    labels = images.labels_of(case.split.forget)
    wrong = synth.invert_labels(labels, 10, rule=RULE, key=case.key)
    return _both(case) | {"forget": images.relabelled(case.split.forget, wrong)}


@dataclasses.dataclass(frozen=True)
class _Distilled:
    """A term whose reference is one of several teachers."""

    term: Any
    teacher: str
    needs_ref: bool = True

    @property
    def reads(self):
        return self.term.reads

    def __call__(self, params, streams, ref, key):
        return self.term(params, streams, ref[self.teacher], key)


@dataclasses.dataclass(frozen=True)
class _WithConstants:
    """A term of the leaves that train; the others are constants. No dropout."""

    term: Any
    rest: Params
    needs_ref: bool = False

    @property
    def reads(self):
        return self.term.reads

    def __call__(self, params, streams, ref, key):
        return self.term(trees.merge(params, self.rest), streams, ref, None)
