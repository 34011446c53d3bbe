# SPDX-License-Identifier: Apache-2.0
"""Size and perplexity of SmolLM2-135M as `hf.save_gguf` writes it, by scheme.

    python -m experiments.benchmarks.gguf --output experiments/results/gguf.json

Each file is written, opened again with `hf.load` and asked for the perplexity of rows
of CPython's language reference: exp of the mean negative log-probability of a token
after the first of its row. Ours computes in float32 on the widened weights; llama.cpp
also rounds activations to 8 bits.

The package's file holds kernels of 4 bits (Q4_1) already. F32 is what that says; Q4_0
rounds it a second time, on another grid, which costs more than one rounding would.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxunlearn import data, evaluate
from jaxunlearn.data import prose
from jaxunlearn.io import hf


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints, and writes where --output says."""
    flags = _flags(argv)
    model, params, tokenizer = hf.load(flags.model or hf.smollm2_path())
    rows = data.encode_text(tokenizer, prose.prose()[0], length=flags.length)
    if len(rows["tokens"]) < flags.rows:
        raise ValueError(
            f"The benchmark needs {flags.rows} rows of {flags.length} tokens, got "
            f"{len(rows['tokens'])} from the text. Take fewer or shorter ones."
        )
    rows = {name: x[: flags.rows] for name, x in rows.items()}
    result = {"rows": flags.rows, "length": flags.length}
    for scheme in flags.schemes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{scheme}.gguf"
            start = time.perf_counter()
            hf.save_gguf(model, params, file, tokenizer=tokenizer, scheme=scheme)
            seconds = time.perf_counter() - start
            size = file.stat().st_size
            again, loaded, _ = hf.load(file)
        found = {
            "perplexity": perplexity(again, loaded, rows),
            "megabytes": size / 1e6,
            "save_seconds": seconds,
        }
        result[scheme] = found
        print(f"{scheme}: {found}", flush=True)
    if flags.output:
        path = Path(flags.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def perplexity(model, params, rows) -> float:
    """exp of the mean negative log-probability of the rows' tokens but each first."""
    scores = evaluate.token_scores(model, params, rows, batch_size=4)
    return float(np.exp(-np.mean(np.asarray(scores.logps)[np.asarray(scores.where)])))


def _flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="", help="for hf.load; SmolLM2 by default")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--schemes", nargs="+", default=["f32", "q8_0", "q4_1", "q4_0"])
    parser.add_argument("--output", default="")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
