# SPDX-License-Identifier: Apache-2.0
"""Time, memory and compile time of one step of every method, against plain finetuning.

    python -m experiments.benchmarks.methods

A random decoder of the small world's shape, float32, on 8 forget and 8 retain rows of
64 tokens, the same for all; plain finetuning takes the NLL of all 16 rows. A ratio near
1 means that a method costs what its tokens cost. All methods run in one process, one
step of each after the other, so that a machine that becomes slower affects all of them;
the median over steps is reported. Memory is what the compiler reserves for a step:
temporaries (activations and gradients) and arguments (params, optimizer state, batch,
reference). Writes experiments/benchmarks/results/methods_cost.json and .md.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxunlearn as ju
from experiments.shared import page
from experiments.small import methods
from jaxunlearn import models

RESULTS = Path(__file__).resolve().parent / "results" / "methods_cost"
ROWS, LENGTH = 8, 64  # rows of a stream, tokens of a row
SHAPE = dict(family="llama", vocab=4000, width=256, layers=5, heads=4, kv_heads=4)
SHAPE |= dict(head_dim=64, hidden=704, positions=LENGTH, tied=True, remat="none")
PLAIN = "plain NLL"
LIMIT = 2.2


def measure(
    model: ju.typing.Model,
    known: Mapping[str, methods.Method],
    *,
    rounds: int,
    rows: int = ROWS,
    length: int = LENGTH,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One dict a method, plain finetuning first; every ratio is to that.

    Args:
        model: a decoder.
        known: methods by name.
        rounds: timed steps of each.
        rows: of each stream.
        length: tokens of a row, all of them real.
        seed: of params and tokens.
    """
    params = model.init(jax.random.key(seed))
    streams = batch(model, rows, length, seed)
    recipes = {PLAIN: methods.finetune(model, 1e-5)}
    recipes |= {
        name: method.build(model, method.rate) for name, method in known.items()
    }
    found, running = {}, {}
    for name, recipe in recipes.items():
        rows_of = {stream: streams[stream] for stream in recipe.reads()}
        key = jax.random.key(seed)
        step, state, frozen = recipe.setup(model, params, key=key)
        start = time.perf_counter()
        compiled = step.lower(state, rows_of, frozen).compile()
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        found[name] = {
            "method": name,
            "tokens": sum(column["tokens"].size for column in rows_of.values()),
            "gradient_trees": len(recipe.terms),
            "reference": recipe.needs_ref,
            "compile_seconds": seconds,
            "temporaries_mb": memory.temp_size_in_bytes / 1e6,
            "arguments_mb": memory.argument_size_in_bytes / 1e6,
        }
        state, _ = jax.block_until_ready(compiled(state, rows_of, frozen))
        running[name] = [compiled, state, rows_of, frozen, []]
    for _ in range(rounds):
        for each in running.values():
            compiled, state, rows_of, frozen, seconds = each
            start = time.perf_counter()
            each[1], _ = jax.block_until_ready(compiled(state, rows_of, frozen))
            seconds.append(time.perf_counter() - start)
    for name, each in running.items():
        found[name]["milliseconds"] = 1e3 * statistics.median(each[-1])
    plain = found[PLAIN]
    for line in found.values():
        # Ratios are to plain steps of as many tokens as the method reads.
        same = line["tokens"] / plain["tokens"]
        line["time_ratio"] = line["milliseconds"] / plain["milliseconds"] / same
        line["memory_ratio"] = _peak(line) / _peak(plain)
        line["compile_ratio"] = line["compile_seconds"] / plain["compile_seconds"]
    return list(found.values())


def batch(model, rows, length, seed) -> dict[str, dict[str, np.ndarray]]:
    """Random tokens for every stream that a recipe may read; the second half counts."""
    rng = np.random.default_rng(seed)

    def stream():
        shape = (rows, length)
        answer = np.zeros(shape, np.bool_)
        answer[:, length // 2 :] = True
        tokens = rng.integers(0, model.config.vocab, shape, np.int32)
        return {"tokens": tokens, "mask": np.ones(shape, np.bool_), "answer": answer}

    columns = {
        "ref_logps": np.full(rows, -8.0 * (length // 2), np.float32),
        "pair": np.arange(rows, dtype=np.int32),
    }
    return {name: stream() | columns for name in ("forget", "retain", "alternate")}


def markdown(lines: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """The table, and the methods above the limit."""
    header = ["method", "ms", "time ratio", "temporaries MB", "arguments MB"]
    header += ["memory ratio", "compile s", "compile ratio", "gradient trees"]
    rows = [
        (
            x["method"],
            f"{x['milliseconds']:.0f}",
            f"{x['time_ratio']:.2f}",
            f"{x['temporaries_mb']:.0f}",
            f"{x['arguments_mb']:.0f}",
            f"{x['memory_ratio']:.2f}",
            f"{x['compile_seconds']:.1f}",
            f"{x['compile_ratio']:.2f}",
            x["gradient_trees"],
            "yes" if x["reference"] else "no",
        )
        for x in lines
    ]
    above = [x["method"] for x in lines if x["time_ratio"] > LIMIT]
    out = [
        "# What a step of each method costs",
        "",
        "Written by `python -m experiments.benchmarks.methods` on two CPU cores: "
        f"medians of {rounds} steps, {ROWS} + {ROWS} rows of {LENGTH} tokens, a "
        "decoder of 5.0M parameters. Ratios are to a plain NLL step of the same "
        "tokens. Memory is what the compiled step needs: its temporaries and its "
        "arguments.",
        "",
        *page.table([*header, "reference"], rows),
        f"Above {LIMIT} plain steps: {', '.join(above) or 'none'}.",
    ]
    return "\n".join(out) + "\n"


def _peak(line: Mapping[str, Any]) -> float:
    return line["temporaries_mb"] + line["arguments_mb"]


def main(argv: list[str] | None = None) -> None:
    """Measures every method and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    model = models.make(models.DecoderConfig(**SHAPE))
    lines = measure(model, methods.methods(), rounds=options.rounds)
    text = markdown(lines, options.rounds)
    content = {"rows": ROWS, "length": LENGTH, "rounds": options.rounds}
    page.write_json(RESULTS.with_suffix(".json"), content | {"methods": lines})
    page.write_text(RESULTS.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
