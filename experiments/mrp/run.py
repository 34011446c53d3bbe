# SPDX-License-Identifier: Apache-2.0
"""MRP in the small world: three topics one after another, then relearning (2508.15449).

    python -m experiments.mrp.run --config=experiments/small/configs/biographies.py

The authors to forget are cut into topics A, B and C. Each method forgets A, then B,
then C, and is asked about all of them and about the rows to keep after each. Then
attackers train on every other row of A to C and are asked about those and about the
rest:

* full: every weight trains, for MRP those that the projections were folded into;
* lora: products of rank 8 beside queries and values; MRP's projections stand still;
* held: every weight trains behind MRP's projections, which stand still;
* unwrapped: nothing trains; MRP's projections are left out, as who has the weights and
  not only the folded ones can do.

A method runs at the lowest of its rates at which A is forgotten (mean probability of
its answers at most FORGOTTEN) on the first seed, or at the one that forgets it most.
All attackers have the same steps and rates; the model that nothing was done to and the
twin, which never saw A to C, are attacked too.

One line of JSON a stage, in `<output>/<world>.mrp.jsonl`: stopped at any time, the same
command goes on. Writes results/mrp_small.json, .md and .png; --draw only that.

Over 400 lines because it holds the methods, the attackers and the run of one paper.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.comparison import run as compare
from experiments.mrp import figures as mrp_figures
from experiments.small import methods, questions, unlearn, world
from jaxunlearn import evaluate, metrics, recipes, trees, wrap
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

TOPICS = ("A", "B", "C")
RATES = (2e-4, 5e-4, 1e-3)
METHODS: Mapping[str, Sequence[float]] = MappingProxyType(
    {
        "mrp.graddiff": (3.0, 10.0, 30.0),  # SGD on rows of length 1
        "openunlearning.ascent": RATES,
        "openunlearning.npo": RATES,
        "blur.npo": RATES,
        "rmu.wmdp": (5e-4, 1e-3, 2e-3),
    }
)
MRP = "mrp.graddiff"
FORGOTTEN = 0.1
CURVE = (0, 10, 30)
RESULTS = Path(__file__).resolve().parent / "results" / "small"


class Plan(NamedTuple):
    """What is run, and how large.

    Attributes:
        methods: name -> its rates.
        seeds: of the order of rows.
        steps: of unlearning, a topic.
        rows: of each stream at a step.
        places: of MRP's projections.
        count: directions a topic, at each layer.
        num_protected: as for `wrap.initial_directions`.
        asked: rows of each topic, and to keep, that are scored.
        curve: steps of an attack after which it is asked.
        rates: of the attacks.
    """

    methods: Mapping[str, Sequence[float]] = METHODS
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 20
    rows: int = 8
    places: Mapping[str, Sequence[int]] = MappingProxyType({"mlp_out": range(5)})
    count: int = 16
    num_protected: int = 8
    asked: int = 16
    curve: Sequence[int] = CURVE
    rates: Sequence[float] = (1e-3,)


class Lab(NamedTuple):
    """What all runs share.

    Attributes:
        small: the world.
        topics: name -> its rows.
        streams: topic -> tables, as unlearn.forget_and_retain gives them.
        asked: name of a set of rows -> (first, last) row in `table`.
        table: all rows that are asked.
        compiled: what was compiled before, by what differs in shape.
    """

    small: world.World
    topics: Mapping[str, Sequence[questions.Row]]
    streams: Mapping[str, dict[str, table.Table]]
    asked: Mapping[str, tuple[int, int]]
    table: table.Table
    compiled: dict[Any, unlearn.Runner]


def lab(small: world.World, plan: Plan) -> Lab:
    """Topics, their tables and the rows that are asked.

    Raises:
        ValueError: if there are fewer authors to forget than topics.
    """
    found = topics(small.questions["forget"])
    streams = {
        name: unlearn.forget_and_retain(
            small._replace(questions={**small.questions, "forget": rows})
        )
        for name, rows in found.items()
    }
    every = [row for rows in found.values() for row in rows]
    parts = {name: rows[: plan.asked] for name, rows in found.items()}
    parts["retain"] = small.questions["retain"][: plan.asked]
    parts["known"], parts["held out"] = every[::2], every[1::2]
    asked, start = {}, 0
    for name, rows in parts.items():
        rows = list(rows)[: 2 * plan.asked]
        asked[name] = (start, start + len(rows))
        start += len(rows)
    rows = [row for part in parts.values() for row in list(part)[: 2 * plan.asked]]
    length = small.about["length"]
    encoded = questions.encode(small.tokenizer, rows, length=length)
    return Lab(small, found, streams, asked, encoded, {})


def topics(rows: Sequence[questions.Row]) -> dict[str, list[questions.Row]]:
    """Rows by topic: as many authors in each, in their order."""
    authors = list(dict.fromkeys(row["author"] for row in rows))
    if len(authors) < len(TOPICS):
        raise ValueError(
            f"small.mrp needs at least {len(TOPICS)} authors to forget, got "
            f"{len(authors)}. Take a world of more."
        )
    parts = np.array_split(np.arange(len(authors)), len(TOPICS))
    of = {
        authors[i]: name for name, part in zip(TOPICS, parts, strict=True) for i in part
    }
    return {name: [row for row in rows if of[row["author"]] == name] for name in TOPICS}


def ask(own: Lab, model: Model, params: Params) -> dict[str, dict[str, float]]:
    """Set of rows -> mean probability of an answer, share of answers that greedy
    decoding gives whole (`exact`) and share of their tokens that it gives (`match`)."""
    scores = evaluate.token_scores(model, params, own.table, batch_size=40)
    nll = metrics.mean_nll(scores.logps, where=scores.where)
    probability = np.exp(-np.nan_to_num(nll, nan=np.inf))
    match = np.asarray(metrics.exact_memorization(scores.hits, where=scores.where))
    return {
        name: {
            "probability": float(probability[start:end].mean()),
            "exact": float((match[start:end] == 1).mean()),
            "match": float(match[start:end].mean()),
        }
        for name, (start, end) in own.asked.items()
    }


def forget(
    own: Lab, plan: Plan, name: str, rate: float, seed: int, until: int = len(TOPICS)
) -> tuple[Model, Params, list[dict[str, Any]]]:
    """(the model, params after the topics, a line for each)."""
    model, params, lines = own.small.model, own.small.params, []
    if name == MRP:
        model = wrap.projection(model, plan.places)
    for index, topic in enumerate(TOPICS[:until]):
        streams = own.streams[topic]
        if name == MRP:
            rows = ([_plain(streams[kind])] for kind in ("forget", "retain"))
            settings = dict(count=plan.count, num_protected=plan.num_protected)
            params = recipes.mrp.begin(params, model, *rows, **settings)
        # MRP's params have other shapes at every topic.
        key = (name, index if name == MRP else 0)
        if key not in own.compiled:
            small = own.small._replace(model=model, params=params)
            sizes = dict(steps=plan.steps, batch_size=plan.rows)
            own.compiled[key] = unlearn.runner(small, _method(name), streams, **sizes)
        made = unlearn.rebind(own.compiled[key], params, streams)
        params, about = unlearn.run(made, rate=rate, seed=seed)
        lines.append({"topic": topic, **about, "scores": ask(own, model, params)})
    return model, params, lines


def attack(
    own: Lab,
    plan: Plan,
    model: Model,
    params: Params,
    kind: str,
    rate: float,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Steps of the attack -> scores, at those of `plan.curve`; see the module."""
    trainable = {"full": r".*", "held": r"(?!projection/).*", "lora": wrap.LORA}[kind]
    if kind == "lora":
        pattern = r"blocks/attention/[qv]/kernel"
        model = wrap.lora(model, pattern=pattern, rank=8)
        params = wrap.add_lora(params, model, jax.random.key(seed))
    rows = [row for part in own.topics.values() for row in part][::2]
    length = own.small.about["length"]
    known = questions.encode(own.small.tokenizer, rows, length=length)
    steps, key = max(plan.curve), (kind, "projection" in params)
    if key not in own.compiled:
        made = methods.Method(
            kind, rate, lambda m, learning_rate: _finetune(m, learning_rate, trainable)
        )
        small = own.small._replace(model=model, params=params)
        sizes = dict(steps=steps, batch_size=plan.rows)
        own.compiled[key] = unlearn.runner(small, made, {"known": known}, **sizes)
    made = unlearn.rebind(own.compiled[key], params, {"known": known})
    found = {"0": ask(own, model, params)} if 0 in plan.curve else {}

    def look(state, entry):
        done = int(state.step)
        if done in plan.curve:
            whole = trees.merge(state.params, made.frozen.params)
            found[str(done)] = ask(own, model, whole)

    unlearn.run(made, rate=rate, seed=seed, hooks=[look])
    return found


def _finetune(model, rate, trainable):
    recipe = recipes.finetune.nll(model, learning_rate=rate, streams={"known": 1.0})
    return recipe._replace(trainable=trainable)


def _method(name: str) -> methods.Method:
    if name == MRP:
        return methods.Method(
            name,
            2e-4,
            lambda model, rate: recipes.mrp.graddiff(model, learning_rate=rate),
        )
    return methods.methods()[name]


def _plain(rows: table.Table) -> dict[str, Any]:
    return {name: rows[name] for name in ("tokens", "mask")}


def exactness(own: Lab, model: Model, params: Params) -> dict[str, float]:
    """Of MRP's last params: `folded`, the largest difference of logits between folded
    and projected weights; `idempotent`, that of P P and P over all layers."""
    batch = {name: x[:16] for name, x in _plain(own.table).items()}
    base = own.small.model
    plain = wrap.fold_projection(params, model)
    ours = model.unembed(params, model.apply(params, batch).hidden)
    folded = base.unembed(plain, base.apply(plain, batch).hidden)
    gaps = []
    for basis in wrap.projection_basis(params).values():
        q = np.asarray(basis, np.float64)
        p = np.eye(q.shape[-1]) - np.einsum("nru,nrv->nuv", q, q)
        gaps.append(np.abs(p @ p - p).max())
    return {
        "folded": float(jnp.max(jnp.abs(folded - ours))),
        "idempotent": float(max(gaps)),
        "directions": sum(
            x.shape[0] * x.shape[1] for x in wrap.projection_basis(params).values()
        ),
    }


def run(
    small: world.World, file: Path, *, plan: Plan | None = None, progress: bool = False
) -> list[compare.Line]:
    """All lines of the experiment, those that `file` lacks run now and added to it.

    Raises:
        ValueError: if the file is of another world or plan.
    """
    plan = Plan() if plan is None else plan
    lines = compare.read(file, head(small, plan))
    if not file.exists():
        compare.add(file, head(small, plan))
    own = lab(small, plan)
    bar = tqdm(disable=not progress, unit="line", dynamic_ncols=True, file=sys.stderr)

    def add(found):
        for line in found:
            if lacks(line["key"]):  # else left by a run that was stopped
                lines.append(line)
                compare.add(file, line)
                bar.update()

    def lacks(key):
        bar.set_postfix_str(key)
        return all(line["key"] != key for line in lines)

    for name in plan.methods:
        for rate in plan.methods[name]:
            if rate_of(lines, name, plan)[0] is not None:
                break
            key = f"sweep {name} {rate:.3g}"
            if lacks(key):
                _, _, (line,) = forget(own, plan, name, rate, plan.seeds[0], until=1)
                add([{"key": key, "method": name, "rate": rate, **line}])
    for seed in plan.seeds:
        for name in ("untouched", "twin", *plan.methods):
            if lacks(f"end {name} {seed}"):
                add(list(_whole(own, plan, lines, name, seed)))
    bar.close()
    return lines


def _whole(own, plan, lines, name, seed):
    """Every line of a method and a seed, the one that says `end` last."""
    small = own.small
    about = {"method": name, "seed": seed}
    if name in ("untouched", "twin"):
        model, params = (
            small.model,
            {"untouched": small.params, "twin": small.retrained}[name],
        )
        yield {"key": f"{name} {seed}", **about, "scores": ask(own, model, params)}
    else:
        rate, _ = rate_of(lines, name, plan)
        model, params, found = forget(own, plan, name, rate, seed)
        for line in found:
            key = f"stage {name} {seed} {line['topic']}"
            yield {"key": key, **about, "rate": rate, **line}
    folded = model, params
    attacks = {"full": None, "lora": None}
    if name == MRP:
        yield {"key": f"exact {seed}", **about} | exactness(own, model, params)
        folded = small.model, wrap.fold_projection(params, model)
        attacks["held"] = None
        bare = {k: x for k, x in params.items() if k != "projection"}
        scores = ask(own, small.model, bare)
        line = {"key": f"attack {name} unwrapped {seed}", **about, "kind": "unwrapped"}
        yield line | {"rate": None, "curve": {"0": scores}}
    for kind in attacks:
        for rate in plan.rates:
            at = folded if kind == "full" else (model, params)
            curve = attack(own, plan, *at, kind, rate, seed)
            key = f"attack {name} {kind} {rate:.3g} {seed}"
            yield {"key": key, **about, "kind": kind, "rate": rate, "curve": curve}
    yield {"key": f"end {name} {seed}", **about}


def rate_of(lines: Sequence[compare.Line], name: str, plan: Plan):
    """(the rate a method runs at, whether it forgets A there); (None, False) until the
    sweep has come so far."""
    own = {
        line["rate"]: line["scores"]["A"]["probability"]
        for line in lines
        if line["key"].startswith(f"sweep {name} ") and line["finite"]
    }
    tried = [line for line in lines if line["key"].startswith(f"sweep {name} ")]
    for rate in plan.methods[name]:
        if own.get(rate, 1.0) <= FORGOTTEN:
            return rate, True
    if len(tried) == len(plan.methods[name]):
        return min(own or plan.methods[name], key=lambda x: own.get(x, x)), False
    return None, False


def head(small: world.World, plan: Plan) -> compare.Line:
    """What the lines of a file have in common; its first line. Seeds may follow."""
    sizes = {
        name: list(x) if isinstance(x, tuple) else x
        for name, x in plan._asdict().items()
    }
    del sizes["seeds"]
    for name in ("methods", "places"):
        sizes[name] = {key: list(x) for key, x in sizes[name].items()}
    return {"key": "head", "world": small.digest, **sizes}


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes mrp_small.json, .md and .png."""
    del argv
    config, plan = flags.FLAGS.config, Plan()
    try:
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.mrp.jsonl"
        if flags.FLAGS.draw:
            lines = compare.read(file, head(small, plan))
        else:
            lines = run(small, file, plan=plan, progress=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    about = head(small, plan) | compare.provenance(small) | {"forgotten": FORGOTTEN}
    mrp_figures.write(lines, about, RESULTS)
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
