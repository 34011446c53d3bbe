# SPDX-License-Identifier: Apache-2.0
"""MRP in the small world: three topics one after another, then relearning (2508.15449).

    python -m experiments.mrp.run

The authors to forget are divided into topics A, B and C. Each method forgets A, then B,
then C, and after each is scored on all of them and on the rows to retain. Then
attackers train on every other row of A to C and are scored on those and on the rest:

* full: every weight trains; MRP's projections are folded into the weights first;
* lora: products of rank 8 on queries and values; MRP's projections do not train;
* frozen projections: every weight trains except MRP's projections;
* no projections: nothing trains; MRP's projections are removed, which an attacker can
  do who has the unfolded weights.

A method runs at the lowest of its rates at which A is forgotten (mean probability of
its answers at most `max_probability`) on the first seed; if there is none, at the rate
that forgets most. All attackers have the same steps and rates. The original and the
retrained model are attacked too.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mrp import figures
from experiments.shared import ledger
from experiments.small import methods, program, questions, unlearn, world
from jaxunlearn import evaluate, metrics, recipes, trees, wrap
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

TOPICS = ("A", "B", "C")
RATES = (2e-4, 5e-4, 1e-3)
MRP = "mrp.graddiff"
METHODS: Mapping[str, Sequence[float]] = MappingProxyType(
    {
        MRP: (3.0, 10.0, 30.0),  # SGD on rows of length 1
        "openunlearning.ascent": RATES,
        "openunlearning.npo": RATES,
        "blur.npo": RATES,
        "rmu.wmdp": (5e-4, 1e-3, 2e-3),
    }
)
TRAINABLE = {
    "full": r".*",
    "lora": wrap.LORA,
    "frozen projections": r"(?!projection/).*",
}
"""Attacker -> what it trains."""


class MrpConfig(NamedTuple):
    """Settings of the experiment.

    Attributes:
        methods: name -> its rates.
        seeds: of the order of rows.
        steps: of unlearning, for each topic.
        batch_size: rows of each stream at a step.
        sites: of MRP's projections, site -> layers.
        num_directions: for each topic, at each layer.
        num_protected: as for `wrap.initial_directions`.
        num_scored: rows of each topic, and of the rows to retain, that are scored.
        eval_steps: steps of an attack after which it is scored.
        attack_rates: learning rates of the attacks.
        max_probability: a topic is forgotten where the mean probability of its answers
            is at most this.
    """

    methods: Mapping[str, Sequence[float]] = METHODS
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 20
    batch_size: int = 8
    sites: Mapping[str, Sequence[int]] = MappingProxyType({"mlp_out": range(5)})
    num_directions: int = 16
    num_protected: int = 8
    num_scored: int = 16
    eval_steps: Sequence[int] = (0, 10, 30)
    attack_rates: Sequence[float] = (1e-3,)
    max_probability: float = 0.1


class Context(NamedTuple):
    """What all runs share.

    Attributes:
        small: the world.
        config: the settings.
        topics: name -> its rows.
        streams: topic -> its tables, from unlearn.forget_and_retain.
        table: all rows that are scored.
        places: set of rows -> (first, last) row in `table`.
        train: what attackers train on.
        compiled: steps compiled before, by what changes their shapes.
    """

    small: world.World
    config: MrpConfig
    topics: Mapping[str, Sequence[questions.Row]]
    streams: Mapping[str, dict[str, table.Table]]
    table: table.Table
    places: Mapping[str, tuple[int, int]]
    train: table.Table
    compiled: dict[Any, unlearn.Runner]

    def runner(self, key, model, params, method, streams, steps) -> unlearn.Runner:
        """The method's step, compiled once for each key."""
        if key not in self.compiled:
            small = self.small._replace(model=model, params=params)
            sizes = dict(steps=steps, batch_size=self.config.batch_size)
            self.compiled[key] = unlearn.runner(small, method, streams, **sizes)
        return unlearn.rebind(self.compiled[key], params, streams)


def prepare(small: world.World, config: MrpConfig) -> Context:
    """Topics, their tables and the rows that are scored.

    Raises:
        ValueError: if there are fewer authors to forget than topics.
    """
    topics = split_topics(small.questions["forget"])
    streams = {}
    for name, rows in topics.items():
        part = small._replace(questions={**small.questions, "forget": rows})
        streams[name] = unlearn.forget_and_retain(part)
    every = [row for rows in topics.values() for row in rows]
    sets = {name: rows[: config.num_scored] for name, rows in topics.items()}
    sets["retain"] = small.questions["retain"][: config.num_scored]
    sets["trained"] = every[::2][: 2 * config.num_scored]
    sets["held out"] = every[1::2][: 2 * config.num_scored]
    ends = np.cumsum([0, *map(len, sets.values())]).tolist()
    places = dict(zip(sets, zip(ends[:-1], ends[1:], strict=True), strict=True))
    encode = partial(questions.encode, small.tokenizer, length=small.about["length"])
    scored = encode([row for rows in sets.values() for row in rows])
    train = encode(every[::2])
    return Context(small, config, topics, streams, scored, places, train, {})


def split_topics(rows: Sequence[questions.Row]) -> dict[str, list[questions.Row]]:
    """Rows by topic, with equally many authors each, in their order."""
    authors = list(dict.fromkeys(row["author"] for row in rows))
    if len(authors) < len(TOPICS):
        raise ValueError(
            f"experiments.mrp needs at least {len(TOPICS)} authors to forget, got "
            f"{len(authors)}. Use a world with more."
        )
    parts = np.array_split(authors, len(TOPICS))
    return {
        name: [row for row in rows if row["author"] in set(part.tolist())]
        for name, part in zip(TOPICS, parts, strict=True)
    }


def score(
    context: Context, model: Model, params: Params
) -> dict[str, dict[str, float]]:
    """Set of rows -> mean probability of an answer, fraction of answers that greedy
    decoding gives completely (`exact`) and fraction of their tokens (`match`)."""
    scores = evaluate.token_scores(model, params, context.table, batch_size=40)
    nll = metrics.mean_nll(scores.logps, where=scores.where)
    probability = np.exp(-np.nan_to_num(nll, nan=np.inf))
    match = np.asarray(metrics.exact_memorization(scores.hits, where=scores.where))
    return {
        name: {
            "probability": float(probability[start:end].mean()),
            "exact": float((match[start:end] == 1).mean()),
            "match": float(match[start:end].mean()),
        }
        for name, (start, end) in context.places.items()
    }


def forget(
    context: Context, name: str, rate: float, seed: int, topics: int = len(TOPICS)
) -> tuple[Model, Params, list[dict[str, Any]]]:
    """(the model, params after so many topics, a line for each topic)."""
    config, model = context.config, context.small.model
    params, lines = context.small.params, []
    method = methods.of_recipe(MRP, recipes.mrp.graddiff)
    if name == MRP:
        model = wrap.projection(model, config.sites)
    else:
        method = methods.methods()[name]
    for index, topic in enumerate(TOPICS[:topics]):
        streams = context.streams[topic]
        if name == MRP:
            params = recipes.mrp.begin(
                model,
                params,
                forget=[_inputs(streams["forget"])],
                retain=[_inputs(streams["retain"])],
                num_directions=config.num_directions,
                num_protected=config.num_protected,
            )
        # MRP's params have other shapes at every topic.
        key = (name, index if name == MRP else 0)
        runner = context.runner(key, model, params, method, streams, config.steps)
        params, about = unlearn.run(runner, rate=rate, seed=seed)
        lines.append({"topic": topic, **about, "scores": score(context, model, params)})
    return model, params, lines


def attack(
    context: Context,
    model: Model,
    params: Params,
    attacker: str,
    rate: float,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Steps of the attack -> scores, at those of `eval_steps`; see the module."""
    if attacker == "lora":
        model = wrap.lora(model, pattern=r"blocks/attention/[qv]/kernel", rank=8)
        params = wrap.add_lora(model, params, jax.random.key(seed))

    def finetune(model, *, learning_rate):
        recipe = recipes.finetune.nll(
            model, learning_rate=learning_rate, streams={"train": 1.0}
        )
        return recipe._replace(trainable=TRAINABLE[attacker])

    method, eval_steps = (
        methods.of_recipe(attacker, finetune),
        context.config.eval_steps,
    )
    key, streams = (attacker, "projection" in params), {"train": context.train}
    runner = context.runner(key, model, params, method, streams, max(eval_steps))
    found = {"0": score(context, model, params)} if 0 in eval_steps else {}

    def look(state, entry):
        if int(state.step) in eval_steps:
            merged = trees.merge(state.params, runner.frozen.params)
            found[str(int(state.step))] = score(context, model, merged)

    unlearn.run(runner, rate=rate, seed=seed, hooks=[look])
    return found


def _inputs(rows: table.Table) -> dict[str, Any]:
    return {name: rows[name] for name in ("tokens", "mask")}


def exactness(context: Context, model: Model, params: Params) -> dict[str, float]:
    """Of MRP's last params: `folded`, the largest difference of logits between folded
    and projected weights; `idempotent`, that of P P and P over all layers."""
    batch = {name: x[:16] for name, x in _inputs(context.table).items()}
    base = context.small.model
    plain = wrap.fold_projection(model, params)
    projected = model.unembed(params, model.apply(params, batch).hidden)
    folded = base.unembed(plain, base.apply(plain, batch).hidden)
    gaps, bases = [], list(wrap.projection_basis(params).values())
    for basis in bases:
        q = np.asarray(basis, np.float64)
        p = np.eye(q.shape[-1]) - np.einsum("nru,nrv->nuv", q, q)
        gaps.append(np.abs(p @ p - p).max())
    return {
        "folded": float(jnp.max(jnp.abs(folded - projected))),
        "idempotent": float(max(gaps)),
        "directions": sum(x.shape[0] * x.shape[1] for x in bases),
    }


def run(small: world.World, book: ledger.Ledger, config: MrpConfig) -> None:
    """Adds all runs that the ledger lacks."""
    context = prepare(small, config)
    for name, rates in config.methods.items():
        for rate in rates:
            if rate_of(book.lines, name, config)[0] is not None:
                break
            key = f"sweep {name} {rate:.3g}"
            if book.lacks(key):
                *_, (line,) = forget(context, name, rate, config.seeds[0], topics=1)
                book.add({"key": key, "method": name, "rate": rate, **line})
    for seed in config.seeds:
        for name in ("original", "retrained", *config.methods):
            if book.lacks(f"end {name} {seed}"):
                rate, _ = rate_of(book.lines, name, config)
                for line in _all_lines(context, name, rate, seed):
                    if book.lacks(line["key"]):
                        book.add(line)


def _all_lines(context, name, rate, seed) -> Iterator[dict[str, Any]]:
    """Every line of a method and a seed; the one with the key `end` is the last."""
    small, about = context.small, {"method": name, "seed": seed}
    references = {"original": small.params, "retrained": small.retrained}
    if name in references:
        model, params = small.model, references[name]
        scores = score(context, model, params)
        yield {"key": f"{name} {seed}", **about, "scores": scores}
    else:
        model, params, found = forget(context, name, rate, seed)
        for line in found:
            key = f"stage {name} {seed} {line['topic']}"
            yield {"key": key, **about, "rate": rate, **line}
    attacked = {"full": (model, params), "lora": (model, params)}
    if name == MRP:
        yield {"key": f"exact {seed}", **about, **exactness(context, model, params)}
        attacked["full"] = small.model, wrap.fold_projection(model, params)
        attacked["frozen projections"] = model, params
        bare = {k: x for k, x in params.items() if k != "projection"}
        curve, attacker = {"0": score(context, small.model, bare)}, "no projections"
        line = {"key": f"attack {name} {attacker} {seed}", **about}
        yield line | {"attacker": attacker, "rate": None, "curve": curve}
    for attacker, start in attacked.items():
        for rate in context.config.attack_rates:
            curve = attack(context, *start, attacker, rate, seed)
            line = {"key": f"attack {name} {attacker} {rate:.3g} {seed}", **about}
            yield line | {"attacker": attacker, "rate": rate, "curve": curve}
    yield {"key": f"end {name} {seed}", **about}


def rate_of(lines: Sequence[ledger.Line], name: str, config: MrpConfig):
    """(the rate of a method, whether it forgets A there), as ledger.lowest_rate."""
    measured = {
        line["rate"]: line["scores"]["A"]["probability"] if line["finite"] else None
        for line in lines
        if line["key"].startswith(f"sweep {name} ")
    }
    rates = config.methods.get(name, ())
    return ledger.lowest_rate(rates, measured, config.max_probability)


if __name__ == "__main__":
    program.main(
        run, figures.write, __doc__, module="experiments.mrp.run", settings=MrpConfig()
    )
