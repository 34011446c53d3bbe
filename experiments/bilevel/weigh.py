# SPDX-License-Identifier: Apache-2.0
"""Learns how strongly to forget and which retain rows to trust, by a hypergradient.

    python -m experiments.bilevel.weigh --config=experiments/small/configs/biographies.py

A third of the retain rows have a wrong answer. The lower level unlearns,

    G(x, y) = gamma NPO(forget) + sum_i w_i NLL(retain row i) + pull / 2 |y - y_0|^2,

with gamma = exp(x["gamma"]) and w = softmax(x["rows"]); the upper level looks at rows
that are not trained on, p being exp(mean log-probability of an answer's token):

    F(y) = mean p(forget, held out) + 1 - mean p(retain, held out).

`bilevel.f2sa` follows the hypergradient of F: two chains of Adam on F / strength + G
and on G, solved for a while first and then a few steps between two updates of x, first
derivatives only. What was
learnt is then judged as a grid is: unlearn from y_0 anew with x fixed, and score on
rows that neither level has seen. The grid tries gammas with equal weights; `clean` is
the same grid with the wrong rows left out, which nobody could know.

Writes results/weigh_small.json, .md and .png; one line of JSON a run in
`<output>/<world>.weigh.jsonl`, so that the same command goes on where it stopped.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.bilevel import figures as weigh_figures
from experiments.comparison import run as compare
from experiments.small import questions, world
from jaxunlearn import bilevel, evaluate, losses, terms
from jaxunlearn.io import log
from jaxunlearn.typing import Array, Batch, Params, PyTree

SEEDS = (0, 1, 2)
GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
WRONG = 3  # every third retain row
RESULTS = Path(__file__).resolve().parent / "results" / "weigh"


class Plan(NamedTuple):
    """Sizes and rates.

    Attributes:
        forget, retain: rows that the lower level trains on.
        held_out: rows of each kind that the upper level looks at.
        test: rows of each kind that score the outcome.
        start: gamma at first.
        pull: towards y_0.
        strength: lambda, from its first to its last value, geometrically.
        updates: of x.
        warm_up: steps of each chain before the first of them.
        steps: of each chain between two updates of x.
        learning_rate: Adam's, for y.
        x_lr: Adam's, for x.
        unlearn: steps with x fixed, for the grid and for what was learnt.
        grid: gammas.
        seeds: which rows are which.
    """

    forget: int = 16
    retain: int = 48
    held_out: int = 24
    test: int = 48
    start: float = 0.1
    pull: float = 0.03
    strength: tuple[float, float] = (20.0, 100.0)
    updates: int = 30
    warm_up: int = 40
    steps: int = 2
    learning_rate: float = 3e-4
    x_lr: float = 0.1
    unlearn: int = 60
    grid: tuple[float, ...] = GRID
    seeds: tuple[int, ...] = SEEDS


class Rows(NamedTuple):
    """Who sees what: batches of one seed, and which retain rows are wrong [retain]."""

    forget: Batch
    retain: Batch
    held_out: Mapping[str, Batch]
    test: Mapping[str, Batch]
    wrong: np.ndarray


def rows_of(small: world.World, plan: Plan, seed: int) -> Rows:
    """Rows dealt from a seed, none to two hands.

    Raises:
        ValueError: if the world has too few.
    """
    deal = np.random.default_rng(seed)
    hands: dict[str, dict[str, Any]] = {}
    for kind, trained in (("forget", plan.forget), ("retain", plan.retain)):
        scored = [r for r in small.questions[kind] if "perturbed_answer" in r]
        needed = trained + plan.held_out + plan.test
        if len(scored) < needed:
            raise ValueError(
                f"This plan needs {needed} {kind} rows with wrong answers, got "
                f"{len(scored)}. Take fewer test rows or a larger world."
            )
        order = [scored[i] for i in deal.permutation(len(scored))[:needed]]
        cut = (trained, trained + plan.held_out)
        hands[kind] = {
            "trained": order[: cut[0]],
            "held_out": order[cut[0] : cut[1]],
            "test": order[cut[1] :],
        }
    own = partial(questions.encode, small.tokenizer, length=small.about["length"])
    wrong = np.arange(plan.retain) % WRONG == 0
    retain = hands["retain"]["trained"]
    answers = [
        row["perturbed_answer"][0] if bad else row["answer"]
        for row, bad in zip(retain, wrong, strict=True)
    ]
    forget = own(hands["forget"]["trained"])
    forget = evaluate.reference_logps(small.model, small.params, forget)
    each = {
        name: {kind: own(hands[kind][name]) for kind in hands}
        for name in ("held_out", "test")
    }
    return Rows(forget, own(retain, answers), each["held_out"], each["test"], wrong)


def levels(small: world.World, rows: Rows, pull: float):
    """(F, G) of (x, y), each a scalar float32."""
    model, start = small.model, small.params

    def upper(x, y):
        del x
        means = [
            jnp.mean(probability(model, y, rows.held_out[kind]))
            for kind in ("forget", "retain")
        ]
        return means[0] + 1.0 - means[1]

    def lower(x, y):
        logps, _ = terms.target_logps(model, y, rows.forget)
        forget = losses.npo(logps.sum(axis=1), rows.forget["ref_logps"], beta=0.1)
        logps, where = terms.target_logps(model, y, rows.retain)
        nll = -logps.sum(axis=1) / where.sum(axis=1).astype(jnp.float32)
        weights = jax.nn.softmax(x["rows"])
        far = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), y, start)
        pulled = 0.5 * pull * sum(jax.tree.leaves(far))
        return jnp.exp(x["gamma"]) * jnp.mean(forget) + weights @ nll + pulled

    return upper, lower


def probability(model: Any, params: Params, batch: Batch) -> Array:
    """exp(mean log-probability of an answer's token), [B]."""
    logps, where = terms.target_logps(model, params, batch)
    return jnp.exp(logps.sum(axis=1) / where.sum(axis=1).astype(jnp.float32))


def learn(
    small: world.World, rows: Rows, plan: Plan, *, progress: bool = False
) -> tuple[PyTree, list[dict[str, float]]]:
    """(x after all updates, one entry an update).

    After `plan.warm_up` steps of Adam on both chains each update runs `plan.steps`
    more, hands the chains' ends to f2sa and its dx to Adam on x; the chains' optimizers
    live as long as the chains.
    """
    upper, lower = levels(small, rows, plan.pull)
    tx, x_tx = optax.adam(plan.learning_rate), optax.adam(plan.x_lr)
    first, last = plan.strength
    growth = (last / first) ** (1 / max(1, plan.updates - 1))

    def chain(objective, y, state, steps):
        def step(carry, _):
            y, state = carry
            updates, state = tx.update(jax.grad(objective)(y), state, y)
            return (optax.apply_updates(y, updates), state), None

        return jax.lax.scan(step, (y, state), None, length=steps)[0]

    @partial(jax.jit, static_argnums=3, donate_argnums=1)
    def solved(x, chains, strength, steps):
        """Both chains further on: that of F / strength + G, and that of G."""
        (y, y_state), (z, z_state) = chains

        def penalised(y):
            return upper(x, y) / strength + lower(x, y)

        below = partial(lower, x)
        return chain(penalised, y, y_state, steps), chain(below, z, z_state, steps)

    @jax.jit
    def update(x, x_state, y, z, strength):
        found = bilevel.f2sa(upper, lower, x, y, strength=strength, z=z)
        moved, x_state = x_tx.update(found.dx, x_state, x)
        return optax.apply_updates(x, moved), x_state, found.stats

    x = {
        "gamma": jnp.log(jnp.float32(plan.start)),
        "rows": jnp.zeros(plan.retain, jnp.float32),
    }
    # A copy of the start for each chain: they are donated.
    starts = (jax.tree.map(jnp.array, small.params) for _ in range(2))
    chains = tuple((y, tx.init(y)) for y in starts)
    x_state, entries = x_tx.init(x), []
    chains = solved(x, chains, jnp.float32(first), plan.warm_up)
    for i in tqdm(range(plan.updates), disable=not progress, unit="update"):
        strength = jnp.float32(first * growth**i)
        chains = solved(x, chains, strength, plan.steps)
        (y, _), (z, _) = chains
        x, x_state, stats = update(x, x_state, y, z, strength)
        entries.append(_entry(x, stats, rows.wrong))
    return x, entries


def unlearner(small: world.World, rows: Rows, plan: Plan):
    """x -> scores on the test rows after `plan.unlearn` steps of Adam on G(x, .)."""
    _, lower = levels(small, rows, plan.pull)

    @jax.jit
    def solve(x, start):
        tx = optax.adam(plan.learning_rate)
        return bilevel.solve(partial(lower, x), start, tx, plan.unlearn)

    def scores(x: PyTree) -> dict[str, float]:
        y = solve(x, small.params)
        forget, retain = (
            float(jnp.mean(probability(small.model, y, rows.test[kind])))
            for kind in ("forget", "retain")
        )
        return {
            "forget_probability": forget,
            "retain_probability": retain,
            "upper": forget + 1.0 - retain,
        }

    return scores


def compare_with_grid(
    small: world.World, file: Path, plan: Plan, *, progress: bool = False
) -> list[dict[str, Any]]:
    """All runs of the plan, those that `file` lacks run now and added to it.

    Raises:
        ValueError: if the file is of another world or plan, or the world too small.
    """
    lines = compare.read(file, head(small, plan))
    if not file.exists():
        compare.add(file, head(small, plan))
    done = {line["key"] for line in lines}

    def add(line):
        lines.append(line)
        compare.add(file, line)

    equal = jnp.zeros(plan.retain, jnp.float32)
    for seed in plan.seeds:
        rows = rows_of(small, plan, seed)
        scores = unlearner(small, rows, plan)
        if f"learnt {seed}" not in done:
            x, entries = learn(small, rows, plan, progress=progress)
            about = {"key": f"learnt {seed}", "run": "learnt", "seed": seed}
            about |= {"gamma": float(jnp.exp(x["gamma"])), "updates": entries}
            about |= {"weights": np.asarray(jax.nn.softmax(x["rows"])).tolist()}
            about |= {"wrong": rows.wrong.tolist()}
            add(about | scores(x))
        clean = jnp.where(rows.wrong, jnp.float32(-1e9), jnp.float32(0))
        for run, logits in (("grid", equal), ("clean", clean)):
            for gamma in plan.grid:
                key = f"{run} {gamma:g} {seed}"
                if key not in done:
                    x = {"gamma": jnp.log(jnp.float32(gamma)), "rows": logits}
                    about = {"key": key, "run": run, "seed": seed, "gamma": gamma}
                    add(about | scores(x))
    return lines


def head(small: world.World, plan: Plan) -> dict[str, Any]:
    """What the lines of a file have in common; its first line."""
    return {"key": "head", "world": small.digest, **log.plain(plan._asdict())}


def _entry(x, stats, wrong):
    """What one update leaves for the figures."""
    weights = np.asarray(jax.nn.softmax(x["rows"]))
    return {
        "gamma": float(jnp.exp(x["gamma"])),
        "wrong_weight": float(weights[wrong].sum()),
        **{name: float(value) for name, value in stats.items()},
    }


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes the figures."""
    del argv
    config, plan = flags.FLAGS.config, Plan()
    try:
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.weigh.jsonl"
        lines = compare_with_grid(small, file, plan, progress=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    weigh_figures.write(lines, head(small, plan), RESULTS)
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
