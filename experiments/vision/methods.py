# SPDX-License-Identifier: Apache-2.0
"""Ways to forget, each a composition of what the library has for language too."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.vision import world as worlds
from jaxunlearn import (
    Frozen,
    combine,
    edits,
    evaluate,
    fit_stages,
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
from jaxunlearn.models import gan as gans
from jaxunlearn.models import vision
from jaxunlearn.recipes.condensation import STREAMS
from jaxunlearn.typing import Params

RULE = "random_wrong"  # how labels are turned round
STATISTICS = 5  # batches that statistics are measured on after a stage


class Case(NamedTuple):
    """What a method gets.

    Attributes:
        world, split: data, network, and what is forgotten.
        params: the original model.
        seed: of everything drawn.
        shared: made once a seed for several methods: "condensed" and its seconds.
    """

    world: worlds.World
    split: images.Split
    params: Params
    seed: int
    shared: dict[str, Any]

    @property
    def key(self):
        return jax.random.key(self.seed)

    @property
    def steps(self) -> int:
        return self.world.config.tune * worlds.epoch(self.world, self.split.retain)


class Result(NamedTuple):
    """Params, CPU seconds of forgetting, and of what comes before it (`offline`)."""

    params: Params
    seconds: float
    offline: float = 0.0
    about: Mapping[str, Any] = {}


def retrain(case: Case) -> Result:
    """From scratch, without the rows to forget: the reference."""
    return Result(*worlds.original(case.world, case.split.retain, seed=case.seed + 100))


def finetune(case: Case) -> Result:
    """Training on, on what stays."""
    recipe = recipes.finetune.nll(
        case.world.model, learning_rate=1e-3, streams={"retain": 1.0}
    )
    return _run(case, recipe, {"retain": case.split.retain})


def ascent(case: Case) -> Result:
    """Up the loss of the rows to forget, a few steps."""
    recipe = recipes.openunlearning.ascent(case.world.model, learning_rate=1e-4)
    return _run(case, recipe, {"forget": case.split.forget}, steps=10)


def random_labels(case: Case) -> Result:
    """Other labels for the rows to forget, beside what stays."""
    both = {"forget": 1.0, "retain": 1.0}
    recipe = recipes.finetune.nll(case.world.model, learning_rate=1e-3, streams=both)
    return _run(case, recipe, _relabelled(case))


def salun(case: Case) -> Result:
    """The same, moving only the half of the weights on which the gradient of the rows
    to forget, all of them with their own labels, is largest."""
    model = case.world.model
    parts = {k: terms.on_logps(losses.nll, model, k) for k in ("forget", "retain")}
    inner = optax.chain(combine.weighted_sum(), optax.adam(1e-3))
    tx = combine.saliency(inner, percentile=50.0, unit="weight", refresh="once")
    half, rest = trees.split(case.params, vision.TRAINABLE)
    state, start = init_state(half, tx, case.key), time.process_time()
    # One step of all rows, of which the mask alone is kept.
    rows = {"forget": case.split.forget, "retain": case.split.forget}
    marked, _ = jax.jit(make_step(parts, tx))(state, rows, Frozen(rest, None))
    marked = marked.opt_state._replace(inner=state.opt_state.inner)
    jax.block_until_ready(marked)
    offline = time.process_time() - start
    recipe = recipes.Recipe(parts, tx)
    result = _run(case, recipe, _relabelled(case), opt_state=marked)
    return result._replace(offline=offline)


def dampening(case: Case) -> Result:
    """SSD: weights that matter to the rows to forget shrink; nothing is trained."""
    model, start = case.world.model, time.process_time()
    term = terms.on_logps(losses.nll, model, "rows")
    half, rest = trees.split(case.params, vision.TRAINABLE)
    whole = _Merged(term, rest)
    size = case.world.config.batch

    def importance(rows):
        own = table.num_rows(rows)
        count = max(1, own // size)
        batches = [
            {"rows": table.select(rows, np.arange(i * size, (i + 1) * size) % own)}
            for i in range(count)
        ]
        return stats.fisher(whole, half, batches, case.key, microbatch_size=size)

    new = edits.dampen(
        half,
        forget=importance(case.split.forget),
        all_data=importance(case.world.train),
    )
    seconds = time.process_time() - start
    params = worlds.measured(case.world, trees.merge(new, rest), case.split.retain)
    return Result(params, seconds)


def blur(case: Case) -> Result:
    """BLUR with NPO below and cross-entropy above."""
    recipe = recipes.blur.npo(
        case.world.model, gamma=1.0, learning_rate=1e-3, weight_decay=0.0
    )
    return _run(case, recipe, case.split._asdict())


def bad_teacher(case: Case) -> Result:
    """Near a random network on the rows to forget, near the original on what stays."""
    model = case.world.model
    near = {k: terms.on_tokens(losses.kl, model, k) for k in ("forget", "retain")}
    teachers = {"retain": case.params, "forget": model.init(jax.random.key(999))}
    parts = {k: _Taught(term, k) for k, term in near.items()}
    tx = optax.chain(combine.weighted_sum(), optax.adam(1e-3))
    return _run(case, recipes.Recipe(parts, tx), case.split._asdict(), ref=teachers)


def condensed(case: Case) -> Result:
    """Dataset-condensation-driven unlearning, without the offline modular stage."""
    world, config = case.world, case.world.config
    small, buckets, offline = condense(case)
    reduced = synth.reduce_retain(world.train, buckets, small, case.split.forget_rows)
    labels = images.labels_of(case.split.retain)
    rows = [images.rows_of_class(labels, c, config.kept) for c in np.unique(labels)]
    kept = table.select(case.split.retain, np.concatenate(rows))
    by_class = len(np.unique(labels)) < 10
    nets = {part: world.part(part) for part in vision.PARTS}
    plan = recipes.condensation.unlearn(
        nets,
        rounds=config.rounds,
        # As released: for a class `final` never trains.
        **(
            dict(learning_rate=1e-3, lr_middle=1e-3)
            if by_class
            else dict(threshold=config.threshold)
        ),
    )
    data = {"reduced": reduced.table, "kept": images.as_float(kept)}
    rows_kept = table.num_rows(kept)
    most = min(config.batch, table.num_rows(reduced.table))
    sizes = {"reduced": most, "kept": rows_kept}
    states, steps, batches = {}, {}, {}
    for part, recipe in plan.parts.items():
        half, _ = trees.split(case.params, recipe.trainable)
        states[part] = init_state(half, recipe.tx, case.key)
        steps[part] = jax.jit(make_step(recipe.terms, recipe.tx), donate_argnums=0)
        name = STREAMS[part]
        batches[part] = table.batch_fn({name: data[name]}, sizes[name], seed=case.seed)
    stages = plan.stages(worlds.epoch(world, reduced.table))
    _, rest = trees.split(case.params, vision.TRAINABLE)

    def after(part, params, rest):
        net, rows = nets[part], reduced.table
        new = worlds.measured(world, params, rows, net, most=STATISTICS)
        return trees.split(new, vision.TRAINABLE)[1]

    clock = worlds.Clock()
    how = dict(hooks=[clock], after=after)
    states, rest, _ = fit_stages(steps, states, batches, stages, rest, **how)
    params = rest
    for state in states.values():
        params = trees.merge(params, state.params)
    about = {"ratio": reduced.ratio, "buckets": len(small.buckets)}
    return Result(params, clock.seconds(), offline, about)


def condense(case: Case):
    """(condensed images, buckets, seconds), once a seed: it knows of no forget set."""
    if "condensed" not in case.shared:
        world, start = case.world, time.process_time()
        rows = worlds.features(world.model, case.params, world.train)
        count = world.config.train // world.config.per_bucket
        labels = images.labels_of(world.train)
        buckets = synth.kmeans_per_class(rows, labels, num_clusters=count, key=case.key)
        small = synth.condense(world.model, case.params, world.train, rows, buckets)
        case.shared["condensed"] = small, buckets, time.process_time() - start
    return case.shared["condensed"]


def multi_gan(case: Case) -> Result:
    """Two GANs, their images labelled by the model, forgotten labels turned round."""
    world, config, start = case.world, case.world.config, time.process_time()
    shape = world.model.config.shape
    net = gans.make(gans.GanConfig(shape, latent=64, width=16, ups=2, norm=False))
    streams = {"forget": case.split.forget, "retain": case.split.retain}
    pairs, log = synth.fit_gans(
        net,
        streams,
        key=case.key,
        steps=config.gan_steps,
        batch_size=config.gan_batch,
        loss="relativistic",
        r1=1.0,
        learning_rate=5e-4,
    )
    counts = {
        "forget": table.num_rows(case.split.forget),
        "retain": max(1, table.num_rows(case.split.retain) // 10),
    }
    drawn = {}
    for name, pair in pairs.items():
        made = synth.draw_images(
            net.generate, pair["generator"], counts[name], latent=64, key=case.key
        )
        drawn[name], _ = synth.pseudo_label(world.model, case.params, made)
    case.shared["drawn"] = {k: v["image"][:50] for k, v in drawn.items()}
    mixed = synth.build_mixture(
        forget=case.split.forget,
        retain=case.split.retain,
        drawn_forget=drawn["forget"],
        drawn_retain=drawn["retain"],
        num_classes=10,
        rule=RULE,
        key=case.key,
    )
    offline = time.process_time() - start
    recipe = recipes.finetune.nll(
        world.model, learning_rate=1e-3, streams={"mixed": 1.0}
    )
    result = _run(case, recipe, {"mixed": mixed})
    seen = config.gan_steps * config.gan_batch  # real images of each stream
    epochs = {k: seen / table.num_rows(v) for k, v in streams.items()}
    right = np.mean([e["forget/discriminator/right"] for e in log[-50:]])
    about = {"rule": RULE, "told": float(right), "gan_epochs": epochs}
    return result._replace(offline=offline, about=about)


def no_images(case: Case) -> Result:
    """Multi-GAN's finetuning without any drawn image."""
    mixed = synth.build_mixture(
        forget=case.split.forget,
        retain=case.split.retain,
        num_classes=10,
        rule=RULE,
        key=case.key,
    )
    recipe = recipes.finetune.nll(
        case.world.model, learning_rate=1e-3, streams={"mixed": 1.0}
    )
    return _run(case, recipe, {"mixed": mixed})


METHODS: dict[str, Callable[[Case], Result]] = {
    "retrain": retrain,
    "finetune": finetune,
    "condensation": condensed,
    "multi-GAN": multi_gan,
    "multi-GAN without images": no_images,
    "SalUn": salun,
    "SSD": dampening,
    "BLUR": blur,
    "random labels": random_labels,
    "ascent": ascent,
    "bad teacher": bad_teacher,
}


def _run(case: Case, recipe, streams, *, steps: int = 0, **how: Any) -> Result:
    streams = {k: v for k, v in streams.items() if k != "forget_rows"}
    if any("ref_logps" in getattr(t, "columns", ()) for t in recipe.terms.values()):
        forget = evaluate.reference_logps(
            case.world.model, case.params, streams["forget"], batch_size=100
        )
        streams["forget"] = forget
    params, seconds = worlds.train(
        case.world,
        recipe.terms,
        recipe.tx,
        case.params,
        streams,
        steps=steps or case.steps,
        seed=case.seed,
        kept=case.split.retain,
        **how,
    )
    return Result(params, seconds)


def _relabelled(case: Case) -> dict[str, table.Table]:
    labels = images.labels_of(case.split.forget)
    new = synth.invert_labels(labels, 10, rule=RULE, key=case.key)
    forget = images.relabelled(case.split.forget, new)
    return {"forget": forget, "retain": case.split.retain}


@dataclasses.dataclass(frozen=True)
class _Taught:
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
class _Merged:
    """A term on the leaves that train, the others being constants; no dropout."""

    term: Any
    rest: Params
    needs_ref: bool = False

    @property
    def reads(self):
        return self.term.reads

    def __call__(self, params, streams, ref, key):
        return self.term(trees.merge(params, self.rest), streams, ref, None)
