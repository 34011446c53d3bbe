# SPDX-License-Identifier: Apache-2.0
"""How the cost of a step, an evaluation and an attack grows with the work.

    python -m experiments.benchmarks.cost --output PREFIX

A small decoder, doubled twice along one axis at a time: the depth of the model, the
rows and the tokens of a row of a training step; the rows of an evaluation
(`evaluate.answer_logps`, of 4 to 64 tokens); the facts of an attack
(`attacks.retrain`, one epoch, and as many facts evaluated before and after it). Every
case runs once to compile, then all cases run in turns, so that a machine that becomes
slower affects all of them. The exponent of an axis is log(t_last / t_first) /
log(n_last / n_first) of the medians: 1 is linear, and below 1 a part of the cost does
not grow. Attention grows with the square of the length, which shows where rows are long
next to the model's width: of width 128, 64 to 256 tokens had an exponent of 1.4. Writes
PREFIX.json and PREFIX.png.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxunlearn as ju
from experiments.shared import page, plot
from jaxunlearn import attacks, combine, evaluate, losses, models, terms

SHAPE = dict(family="llama", vocab=2000, width=256, layers=2, heads=4, kv_heads=4)
SHAPE |= dict(head_dim=64, hidden=704, positions=256, tied=True, remat="none")
DEPTH, ROWS, LENGTH = 2, 4, 64  # of a step, where another axis grows
AXES = {
    "depth": (2, 4, 8),
    "batch": (4, 8, 16),
    "length": (64, 128, 256),
    "evaluated rows": (64, 128, 256),
    "facts": (16, 32, 64),
}
WORK = {
    "depth": "layers, step",
    "batch": "rows, step",
    "length": "tokens of a row, step",
    "evaluated rows": "rows, evaluation",
    "facts": "facts, attack",
}
LIMIT = 1.1  # exponent that still counts as linear: time is noisy


def measure(
    rounds: int,
    axes: Mapping[str, Sequence[int]] = AXES,
    shape: Mapping[str, Any] = SHAPE,
) -> dict[str, Any]:
    """Everything that the result holds: the median seconds of every case."""
    cases = {
        (axis, size): _case(axis, size, shape)
        for axis, sizes in axes.items()
        for size in sizes
    }
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    found = {}
    for axis, sizes in axes.items():
        medians = [statistics.median(seconds[axis, size]) for size in sizes]
        exponent = math.log(medians[-1] / medians[0]) / math.log(sizes[-1] / sizes[0])
        found[axis] = {
            "sizes": list(sizes),
            "seconds": medians,
            "exponent": exponent,
            "met": exponent <= LIMIT,
        }
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return about | {"rounds": rounds, "limit": LIMIT, "axes": found}


def _case(axis: str, size: int, shape: Mapping[str, Any]) -> Callable[[], Any]:
    """One case, to be called several times."""
    given = {"depth": DEPTH, "batch": ROWS, "length": LENGTH} | {axis: size}
    config = models.DecoderConfig(**shape | {"layers": given["depth"]})
    model = models.make(config)
    params = model.init(jax.random.key(0))
    if axis == "evaluated rows":
        table = _table(size, LENGTH, config.vocab, shortest=4)
        return lambda: evaluate.answer_logps(model, params, table)
    if axis == "facts":
        table, questions = (
            _table(size, 32, config.vocab),
            _questions(size, config.vocab),
        )
        how = dict(learning_rates=[1e-5], epochs=1, batch_size=8, eval_batch_size=16)
        return lambda: attacks.retrain(model, params, table, questions, **how)
    table = _table(given["batch"], given["length"], config.vocab)
    tx = optax.chain(combine.weighted_sum(), optax.adamw(1e-5))
    parts = {"known": terms.on_logps(losses.nll, model, "known", reduce="token")}
    step = jax.jit(ju.make_step(parts, tx), donate_argnums=0)
    state = ju.init_state(params, tx, jax.random.key(0))

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, {"known": table}, ju.Frozen()))

    return run


def _table(rows: int, length: int, vocab: int, shortest: int | None = None) -> dict:
    """Random rows, of `length` tokens or of `shortest` to `length`."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab, size=(rows, length)).astype(np.int32)
    lengths = rng.integers(shortest or length, length, endpoint=True, size=(rows, 1))
    return {"tokens": tokens, "mask": np.arange(length) < lengths}


def _questions(facts: int, vocab: int) -> dict[str, np.ndarray]:
    """Random questions of 16 tokens with four choices of 4 tokens."""
    rng = np.random.default_rng(1)
    choices = rng.integers(3, vocab, size=(facts, 4, 4)).astype(np.int32)
    real = np.ones(choices.shape, bool)
    return _table(facts, 16, vocab) | {
        "choices": choices,
        "choice_mask": real,
        "choice_answer": real,
        "right": np.zeros(facts, np.int32),
    }


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Seconds against work, both over their first value."""
    with plot.saved(file, size=(6, 4.5)) as (_, grid):
        axis = grid[0, 0]
        for name, found in content["axes"].items():
            work = np.divide(found["sizes"], found["sizes"][0])
            cost = np.divide(found["seconds"], found["seconds"][0])
            label = f"{WORK[name]} ({found['exponent']:.2f})"
            axis.plot(work, cost, marker="o", label=label)
        axis.plot(work, work, color="grey", linestyle="--", label="linear")
        axis.set(xscale="log", yscale="log")
        axis.set(xlabel="work, over the first", ylabel="seconds, over the first")
        for side in (axis.xaxis, axis.yaxis):
            side.set_ticks([1, 2, 4], ["1", "2", "4"])
            side.set_ticks([], minor=True)
        axis.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    """Measures, and writes the result and its plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each case")
    parser.add_argument("--output", default="", help="for PREFIX.json and PREFIX.png")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    found = measure(options.rounds)
    print(json.dumps(found, indent=2))
    if options.output:
        page.write_json(Path(f"{options.output}.json"), found)
        draw(found, Path(f"{options.output}.png"))


if __name__ == "__main__":
    main()
