# SPDX-License-Identifier: Apache-2.0
"""Time of rounding, GPTQ and AWQ (3 bits) on SmolLM2-135M, and how much less they err.

    python -m experiments.benchmarks.quantize --output experiments/benchmarks/results/quantize.json

Calibrates on rows of CPython's language reference. A kernel is one layer of one stacked
leaf; its error is ||(W' - W)^T X||^2 by its own inputs in the model as it is: on the
calibration rows, and on as many rows of the text that no edit has seen. Each edit is
compared with plain rounding on the same grid, which for AWQ is the asymmetric one.
Times are wall clock and include compilation. The bars: rounding within 5 seconds, GPTQ
with 32 rows of 512 tokens within 10 minutes.

SmolLM2's file holds its kernels in 4 bits already, in groups of 32 with a smallest
value each; loading makes floats of them. That grid is none of `quantize`'s, as its zero
lies between codes.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn import data, edits, trees
from jaxunlearn.data import prose
from jaxunlearn.io import hf
from jaxunlearn.typing import Batch, Model, Params

KINDS = {"int4": ("gptq",), "int3": ("gptq", "awq")}
EDITS = {"gptq": (edits.gptq, "symmetric"), "awq": (edits.awq, "asymmetric")}


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints, and writes where --output says."""
    flags = _flags(argv)
    model, params, tokenizer = hf.load(flags.model or hf.smollm2_path())
    rows = data.encode_text(tokenizer, prose.prose()[0], length=flags.length)
    if len(rows["tokens"]) < 2 * flags.rows:
        raise ValueError(
            f"The benchmark needs {2 * flags.rows} rows of {flags.length} tokens, got "
            f"{len(rows['tokens'])} from the text. Take fewer or shorter ones."
        )

    def batches(first):
        stop = first + flags.rows
        return [
            {name: x[i : min(i + flags.batch, stop)] for name, x in rows.items()}
            for i in range(first, stop, flags.batch)
        ]

    settings = dict(group=flags.group, at_once=flags.at_once)
    result = measure(model, params, batches(0), batches(flags.rows), **settings)
    result = {"rows": flags.rows, "length": flags.length} | result
    print(json.dumps(result, indent=2))
    if flags.output:
        path = Path(flags.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def measure(
    model: Model,
    params: Params,
    batches: list[Batch],
    unseen: list[Batch],
    *,
    group: int | str,
    at_once: int | None = None,
) -> dict[str, Any]:
    """Seconds of each edit, and the kernels on which it errs less than rounding.

    Args:
        model, params: what is quantized.
        batches: calibration rows.
        unseen: rows that only errors are measured on.
        group: of weights with one scale, as for `edits.quantize`.
        at_once: layers a pass, as for `edits.gptq`.
    """
    seen, seconds = _timed(lambda: edits.collect_inputs(model, params, batches))
    inputs = {"seen": seen, "unseen": edits.collect_inputs(model, params, unseen)}
    result = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "group": group,
        "at_once": at_once,
        "collect_seconds": seconds,
    }
    for kind, names in KINDS.items():
        result[kind] = {}
        for name in names:
            edit, scheme = EDITS[name]
            how = dict(kind=kind, group=group, scheme=scheme)
            plain, round_seconds = _timed(partial(edits.quantize, params, **how))
            calibrated = partial(
                edit, model, params, batches, layers_per_pass=at_once, **how
            )
            ours, edit_seconds = _timed(calibrated)
            row = {"round_seconds": round_seconds, "seconds": edit_seconds}
            for rows, own in inputs.items():
                ratios = _ratios(model, params, ours, plain, own)
                row[rows] = {
                    "kernels": len(ratios),
                    "errs_less": int((ratios < 1).sum()),
                    "median_error_ratio": float(np.median(ratios)),
                    "largest_error_ratio": float(ratios.max()),
                }
            result[kind][name] = row
            print(f"{kind} {name}: {row}", flush=True)
    return result


def _ratios(model, params, ours, plain, inputs) -> np.ndarray:
    ours, plain = (errors(model, params, p, inputs) for p in (ours, plain))
    return np.concatenate([ours[path] / plain[path] for path in plain])


def errors(
    model: Model, params: Params, new: Params, inputs: dict[str, edits.Inputs]
) -> dict[str, np.ndarray]:
    """||(W' - W)^T X||^2 by leaf, [layers]."""
    old, new = trees.paths(params), trees.paths(new)
    return {
        path: np.asarray(_error(old[path], new[path], inputs[name].gram))
        for name, site in model.sites.items()
        for path in site.readers
    }


@jax.jit
def _error(old, new, gram):
    def one(layer):
        old, new, gram = layer
        gap = (new - old).astype(gram.dtype)
        return (gap * (gram @ gap)).sum()

    return jax.lax.map(one, (old, new, gram))


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = jax.block_until_ready(function())
    return value, time.perf_counter() - start


def _flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="", help="for hf.load; SmolLM2 by default")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="rows in memory at a time")
    parser.add_argument("--group", type=_group, default=64)
    parser.add_argument("--at-once", type=int, default=None, help="layers a pass")
    parser.add_argument("--output", default="")
    return parser.parse_args(argv)


def _group(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


if __name__ == "__main__":
    main()
