# SPDX-License-Identifier: Apache-2.0
"""Time and error of rounding, GPTQ and AWQ (3 bits) on SmolLM2-135M.

    python -m experiments.benchmarks.quantize --output quantize.json

The edits calibrate on rows of CPython's language reference. A kernel is one layer of
one stacked leaf. Its error is ||(W' - W)^T X||^2, where X are its inputs in the
original model: on the calibration rows, and on as many rows that no edit has seen. Each
edit is compared with plain rounding on the same grid, which for AWQ is the asymmetric
one. Times are by the clock and include compilation. The limits: 5 seconds for rounding,
10 minutes for GPTQ with 32 rows of 512 tokens.

SmolLM2's file has its kernels in 4 bits already, in groups of 32 with a smallest value
each; loading converts them to floats. `quantize` has no such grid, because its zero
lies between two codes.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.shared import page
from jaxunlearn import data, edits, trees
from jaxunlearn.data import prose
from jaxunlearn.io import hf
from jaxunlearn.typing import Batch, Model, Params

KINDS = {"int4": ("gptq",), "int3": ("gptq", "awq")}
EDITS = {"gptq": (edits.gptq, "symmetric"), "awq": (edits.awq, "asymmetric")}


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints the numbers, and writes them to --output."""
    options = parse(argv)
    model, params, tokenizer = hf.load(options.model or hf.smollm2_path())
    rows = data.encode_text(tokenizer, prose.prose()[0], length=options.length)
    if len(rows["tokens"]) < 2 * options.rows:
        raise ValueError(
            f"The benchmark needs {2 * options.rows} rows of {options.length} tokens, "
            f"got {len(rows['tokens'])} from the text. Use fewer or shorter ones."
        )

    def batches(first):
        stop = first + options.rows
        return [
            {name: x[i : min(i + options.batch, stop)] for name, x in rows.items()}
            for i in range(first, stop, options.batch)
        ]

    settings = dict(group=options.group, at_once=options.at_once)
    result = measure(model, params, batches(0), batches(options.rows), **settings)
    result = {"rows": options.rows, "length": options.length} | result
    print(json.dumps(result, indent=2))
    if options.output:
        page.write_json(options.output, result)
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
    """Seconds of each edit, and on how many kernels its error is below rounding's.

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
            grid = dict(kind=kind, group=group, scheme=scheme)
            plain, round_seconds = _timed(partial(edits.quantize, params, **grid))
            calibrated = partial(
                edit, model, params, batches, layers_per_pass=at_once, **grid
            )
            ours, edit_seconds = _timed(calibrated)
            row = {"round_seconds": round_seconds, "seconds": edit_seconds}
            for rows, each in inputs.items():
                ratios = _ratios(model, params, ours, plain, each)
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


def parse(argv):
    """The command line."""
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
