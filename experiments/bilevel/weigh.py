# SPDX-License-Identifier: Apache-2.0
"""Learns how strongly to forget and which retain rows to trust, by a hypergradient.

    python -m experiments.bilevel.weigh

A third of the retain rows have a wrong answer. The lower level unlearns,

    G(x, y) = gamma NPO(forget) + sum_i w_i NLL(retain row i) + pull / 2 |y - y_0|^2,

with gamma = exp(x["gamma"]) and w = softmax(x["rows"]). The upper level is computed on
rows that are not trained on, p being exp(mean log-probability of an answer's token):

    F(y) = mean p(forget, held out) + 1 - mean p(retain, held out).

`bilevel.f2sa` follows the hypergradient of F with first derivatives only. It uses two
chains of Adam, on F / strength + G and on G, which first run for some warm-up steps and
then a few steps between two updates of x. The learned x is evaluated as a grid is:
unlearn from y_0 with x fixed, and score on rows that neither level has seen. The grid
tries gammas with equal weights; `clean` is the same grid without the wrong rows, which
no user could know.

Finished runs are kept in `<output>/<world>.weigh.jsonl`; a stopped run resumes with the
same command. --draw only draws the page and the plots again.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bilevel import figures
from experiments.shared import command, ledger, page
from experiments.small import questions, world
from jaxunlearn import bilevel, evaluate, losses, terms
from jaxunlearn.typing import Array, Batch, Params, PyTree

FOLDER = Path(__file__).resolve().parent
CONFIG = "experiments/small/configs/biographies.py"
WRONG_EVERY = 3  # every third retain row


class Settings(NamedTuple):
    """Sizes and rates.

    Attributes:
        forget, retain: rows that the lower level trains on.
        held_out: rows of each kind that the upper level is computed on.
        test: rows of each kind that score the outcome.
        start: gamma at first.
        pull: towards y_0.
        strength: lambda, from its first to its last value, geometrically.
        updates: of x.
        warm_up: steps of each chain before the first of them.
        steps: of each chain between two updates of x.
        learning_rate: Adam's, for y.
        x_learning_rate: Adam's, for x.
        unlearn: steps with x fixed, for the grid and for what was learned.
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
    x_learning_rate: float = 0.1
    unlearn: int = 60
    grid: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    seeds: tuple[int, ...] = (0, 1, 2)


class Rows(NamedTuple):
    """Batches of one seed, and which retain rows are wrong, [retain] bool."""

    forget: Batch
    retain: Batch
    held_out: Mapping[str, Batch]
    test: Mapping[str, Batch]
    wrong: np.ndarray


def split_rows(small: world.World, settings: Settings, seed: int) -> Rows:
    """Disjoint rows for training, holding out and testing, drawn from a seed.

    Raises:
        ValueError: if the world has too few.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, dict[str, Any]] = {}
    for kind, trained in (("forget", settings.forget), ("retain", settings.retain)):
        rows = [r for r in small.questions[kind] if "perturbed_answer" in r]
        needed = trained + settings.held_out + settings.test
        if len(rows) < needed:
            raise ValueError(
                f"This experiment needs {needed} {kind} rows with wrong answers, got "
                f"{len(rows)}. Use fewer test rows or a larger world."
            )
        order = [rows[i] for i in rng.permutation(len(rows))[:needed]]
        end = trained + settings.held_out
        parts[kind] = {
            "trained": order[:trained],
            "held_out": order[trained:end],
            "test": order[end:],
        }
    encode = partial(questions.encode, small.tokenizer, length=small.about["length"])
    wrong = np.arange(settings.retain) % WRONG_EVERY == 0
    retain = parts["retain"]["trained"]
    answers = [
        row["perturbed_answer"][0] if bad else row["answer"]
        for row, bad in zip(retain, wrong, strict=True)
    ]
    forget = encode(parts["forget"]["trained"])
    forget = evaluate.reference_logps(small.model, small.params, forget)
    held_out, test = (
        {kind: encode(parts[kind][name]) for kind in parts}
        for name in ("held_out", "test")
    )
    return Rows(forget, encode(retain, answers), held_out, test, wrong)


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
        distance = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), y, start)
        pulled = 0.5 * pull * sum(jax.tree.leaves(distance))
        return jnp.exp(x["gamma"]) * jnp.mean(forget) + weights @ nll + pulled

    return upper, lower


def probability(model: Any, params: Params, batch: Batch) -> Array:
    """exp(mean log-probability of an answer's token), [B]."""
    logps, where = terms.target_logps(model, params, batch)
    return jnp.exp(logps.sum(axis=1) / where.sum(axis=1).astype(jnp.float32))


def learn(
    small: world.World, rows: Rows, settings: Settings
) -> tuple[PyTree, list[dict[str, float]]]:
    """(x after all updates, one entry an update).

    After `warm_up` steps of Adam on both chains, each update runs `steps` more, gives
    the ends of the chains to f2sa and its dx to Adam on x. The chains keep the state of
    their optimizers from update to update.
    """
    upper, lower = levels(small, rows, settings.pull)
    tx, x_tx = optax.adam(settings.learning_rate), optax.adam(settings.x_learning_rate)
    first, last = settings.strength
    growth = (last / first) ** (1 / max(1, settings.updates - 1))

    def chain(objective, y, state, steps):
        def step(carry, _):
            y, state = carry
            updates, state = tx.update(jax.grad(objective)(y), state, y)
            return (optax.apply_updates(y, updates), state), None

        return jax.lax.scan(step, (y, state), None, length=steps)[0]

    @partial(jax.jit, static_argnums=3, donate_argnums=1)
    def advance(x, chains, strength, steps):
        """More steps of both chains: that of F / strength + G, and that of G."""
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
        "gamma": jnp.log(jnp.float32(settings.start)),
        "rows": jnp.zeros(settings.retain, jnp.float32),
    }
    # A copy of the start for each chain: they are donated.
    starts = (jax.tree.map(jnp.array, small.params) for _ in range(2))
    chains = tuple((y, tx.init(y)) for y in starts)
    x_state, entries = x_tx.init(x), []
    chains = advance(x, chains, jnp.float32(first), settings.warm_up)
    for i in range(settings.updates):
        strength = jnp.float32(first * growth**i)
        chains = advance(x, chains, strength, settings.steps)
        (y, _), (z, _) = chains
        x, x_state, stats = update(x, x_state, y, z, strength)
        entries.append(_entry(x, stats, rows.wrong))
    return x, entries


def unlearner(small: world.World, rows: Rows, settings: Settings):
    """x -> scores on the test rows after `unlearn` steps of Adam on G(x, .)."""
    _, lower = levels(small, rows, settings.pull)

    @jax.jit
    def solve(x, start):
        tx = optax.adam(settings.learning_rate)
        return bilevel.solve(partial(lower, x), start, tx, settings.unlearn)

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
    small: world.World, book: ledger.Ledger, settings: Settings
) -> list[ledger.Line]:
    """All lines of the ledger, the missing ones run now."""
    equal = jnp.zeros(settings.retain, jnp.float32)
    for seed in settings.seeds:
        rows = split_rows(small, settings, seed)
        scores = unlearner(small, rows, settings)
        if book.lacks(f"learnt {seed}"):
            x, entries = learn(small, rows, settings)
            line = {"key": f"learnt {seed}", "run": "learnt", "seed": seed}
            line |= {"gamma": float(jnp.exp(x["gamma"])), "updates": entries}
            line |= {"weights": np.asarray(jax.nn.softmax(x["rows"])).tolist()}
            book.add(line | {"wrong": rows.wrong.tolist()} | scores(x))
        clean = jnp.where(rows.wrong, jnp.float32(-1e9), jnp.float32(0))
        for run, logits in (("grid", equal), ("clean", clean)):
            for gamma in settings.grid:
                key = f"{run} {gamma:g} {seed}"
                if book.lacks(key):
                    x = {"gamma": jnp.log(jnp.float32(gamma)), "rows": logits}
                    line = {"key": key, "run": run, "seed": seed, "gamma": gamma}
                    book.add(line | scores(x))
    return book.lines


def _entry(x, stats, wrong):
    """What the figures need of one update."""
    weights = np.asarray(jax.nn.softmax(x["rows"]))
    return {
        "gamma": float(jnp.exp(x["gamma"])),
        "wrong_weight": float(weights[wrong].sum()),
        **{name: float(value) for name, value in stats.items()},
    }


def run(arguments: command.Arguments) -> None:
    """Runs what is missing, then writes the results and the page."""
    if arguments.options.draw:
        page.redraw(FOLDER, figures.readme, figures.PLOTS)
        return
    config, settings = arguments.config, arguments.settings
    small = world.make(config, progress=True)
    file = Path(config.output).expanduser() / f"{small.digest}.weigh.jsonl"
    head = ledger.head(settings, world=small.digest)
    lines = compare_with_grid(small, ledger.Ledger(file, head, progress=True), settings)
    about = head | {"seeds": list(settings.seeds)}
    content = {"about": about, "summary": figures.summarise(lines), "runs": lines}
    page.publish(FOLDER, "weigh", content, figures.readme, figures.draw_weigh)


if __name__ == "__main__":
    command.main(run, __doc__, config=CONFIG, settings=Settings(), options=figures.DRAW)
