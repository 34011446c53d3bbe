# SPDX-License-Identifier: Apache-2.0
"""Size and perplexity of SmolLM2-135M as `hf.save_gguf` writes it, by scheme.

    python -m experiments.benchmarks.gguf --output gguf.json

Each file is written and opened again with `hf.load`; then the perplexity of rows of
CPython's language reference is computed: exp of the mean negative log-probability of
all tokens but the first of each row. We compute in float32 on the widened weights;
llama.cpp also rounds activations to 8 bits.

The package's file has kernels of 4 bits (Q4_1) already. F32 stores exactly those
values; Q4_0 rounds them a second time, on another grid, which costs more than one
rounding would.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.shared import page
from jaxunlearn import data, evaluate
from jaxunlearn.data import prose
from jaxunlearn.io import hf


def main(argv: list[str] | None = None) -> dict:
    """Measures every scheme, prints the numbers, and writes them to --output."""
    options = parse(argv)
    model, params, tokenizer = hf.load(options.model or hf.smollm2_path())
    rows = data.encode_text(tokenizer, prose.prose()[0], length=options.length)
    if len(rows["tokens"]) < options.rows:
        raise ValueError(
            f"The benchmark needs {options.rows} rows of {options.length} tokens, got "
            f"{len(rows['tokens'])} from the text. Use fewer or shorter ones."
        )
    rows = {name: x[: options.rows] for name, x in rows.items()}
    result = {"rows": options.rows, "length": options.length}
    for scheme in options.schemes:
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
    if options.output:
        page.write_json(options.output, result)
    return result


def perplexity(model, params, rows) -> float:
    """exp of the mean negative log-probability of all tokens but each row's first."""
    scores = evaluate.token_scores(model, params, rows, batch_size=4)
    return float(np.exp(-np.mean(np.asarray(scores.logps)[np.asarray(scores.where)])))


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="", help="for hf.load; SmolLM2 by default")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--schemes", nargs="+", default=["f32", "q8_0", "q4_1", "q4_0"])
    parser.add_argument("--output", default="")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
