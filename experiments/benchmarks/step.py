# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one unlearning step: BLUR, weighted sum, low precision, torch.

    python -m experiments.benchmarks.step --output step.json

NPO on 4 forget sequences plus NLL on 4 retain sequences of 128 tokens, SmolLM2-135M,
AdamW, float32. `auto` computes in the dtype of `compute_dtype="auto"`, and
`torch_bfloat16` under torch's autocast to bfloat16. Every round runs each variant in a
separate process, so that the peak resident memory is that of one variant, and a machine
that becomes slower affects all variants. Medians over all steps of all rounds.
experiments/benchmarks/results/step_smollm2_cpu.json is one such run on two CPU cores.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.shared import page

ROWS, LENGTH, WARM_UP = 4, 128, 1
PARTS = ("forget/loss", "retain/loss")  # of the variants with two terms
VARIANTS = (
    "weighted_sum",
    "weighted_sum_apart",
    "blur",
    "torch",
    "auto",
    "torch_bfloat16",
)
# The first loss is that of equal params. In bfloat16 it may differ from float32's by
# this share, which is an error of 0.3 % in a sequence's log-probability, because NPO
# sums 128 tokens and takes the difference from the reference. Later losses are not
# compared: Adam's first updates magnify the difference of gradients.
BFLOAT16_TOLERANCE = 0.05


def main(argv: list[str] | None = None) -> dict:
    """Measures every variant, prints the numbers, and writes them to --output."""
    options = parse(argv)
    if options.variant:
        print(json.dumps(_one(options)), flush=True)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        _child("prepare", folder, options)
        runs = {name: [] for name in (*VARIANTS, "matmul")}
        for _ in range(options.rounds):
            for name in runs:
                runs[name].append(_child(name, folder, options))
                print(f"{name}: {_brief(runs[name][-1])}", flush=True)
    result = _summary(runs)
    print(json.dumps(result, indent=2))
    if options.output:
        page.write_json(options.output, result)
    return result


def _one(options) -> dict:
    """What one child process measures."""
    if options.variant == "prepare":
        return _prepare(Path(options.folder))
    if options.variant == "matmul":
        return _matmul()
    if options.variant.startswith("torch"):
        from experiments.benchmarks import torch_step

        return torch_step.measure(
            Path(options.folder),
            WARM_UP + options.steps,
            autocast=options.variant == "torch_bfloat16",
        )
    return _jax(options)


def _prepare(folder: Path) -> dict:
    """The model as a folder and real text as batches, for both frameworks."""
    import numpy as np

    from jaxunlearn.data import prose, table
    from jaxunlearn.io import hf

    model, params, tokenizer = hf.load(hf.smollm2_path())
    hf.save(model, params, folder / "model")  # loading a tokenizer would cost memory
    rows = table.encode_text(tokenizer, prose.prose()[0], length=LENGTH)["tokens"]
    np.savez(
        folder / "batch.npz",
        forget=rows[:ROWS],
        retain=rows[ROWS : 2 * ROWS],
        ref_logps=np.full(ROWS, -400.0, np.float32),
    )
    return {}


def _jax(options) -> dict:
    import jax
    import numpy as np
    import optax

    from jaxunlearn import combine, recipes
    from jaxunlearn.io import hf

    auto = options.variant == "auto"
    model, params, _ = hf.load(
        Path(options.folder) / "model",
        compute_dtype="auto" if auto else "float32",
        remat=options.auto_remat if auto else options.remat,
    )
    together = recipes.openunlearning.npo(model, clip=None, weight_decay=0.01)
    blur = recipes.blur.npo(model, gamma=0.1)
    adamw = optax.adamw(1e-5, weight_decay=0.01)
    apart = blur._replace(tx=optax.chain(combine.weighted_sum(), adamw))
    recipe = {
        "weighted_sum": together,  # one joint term: one forward pass, one gradient tree
        "auto": together,
        "weighted_sum_apart": apart,  # BLUR's two terms, gradients added
        "blur": blur,
    }[options.variant]
    saved = np.load(Path(options.folder) / "batch.npz")
    streams = {
        name: {"tokens": saved[name], "mask": np.ones((ROWS, LENGTH), np.bool_)}
        for name in ("forget", "retain")
    }
    streams["forget"]["ref_logps"] = saved["ref_logps"]
    step, state, frozen = recipe.setup(model, params)
    del params
    start = time.perf_counter()
    compiled = step.lower(state, streams, frozen).compile()
    compile_seconds = time.perf_counter() - start
    # What compiling left in the heap would otherwise count as the step's memory.
    ctypes.CDLL(None).malloc_trim(0)
    seconds, losses = [], []
    for _ in range(WARM_UP + options.steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, streams, frozen))
        seconds.append(time.perf_counter() - start)
        parts = (v for k, v in metrics.items() if k in ("total/loss", *PARTS))
        losses.append(sum(float(v) for v in parts))
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds[WARM_UP:],
        "compile_seconds": compile_seconds,
        "peak_gb": peak_gb(),
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "losses": losses,
        "compute_dtype": model.config.compute_dtype,
    }


def _matmul() -> dict:
    """float32 GFLOP/s of jax at the shapes of the model's matrix products."""
    import jax
    import jax.numpy as jnp

    rates = {}
    for rows, out, into in ((1024, 1536, 576), (1024, 49152, 576), (2048, 2048, 2048)):
        a, b = jnp.ones((rows, into)), jnp.ones((into, out))
        product = jax.jit(lambda a, b: a @ b)
        best = min(_seconds(product, a, b) for _ in range(8))
        rates[f"{rows}x{out}x{into}"] = 2e-9 * rows * out * into / best
    return {"gflops": rates}


def _seconds(function, *arguments) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def peak_gb() -> float:
    """Peak resident memory of this process, in units of 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _child(variant: str, folder: str, options) -> dict:
    command = [sys.executable, "-m", "experiments.benchmarks.step"]
    command += ["--variant", variant, "--folder", folder]
    command += ["--steps", str(options.steps), "--remat", options.remat]
    command += ["--auto-remat", options.auto_remat]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    # One heap for all threads, in every variant: memory that a compiler or a loader
    # frees is used again instead of staying resident; the peak is that of the step.
    environment["MALLOC_ARENA_MAX"] = "1"
    # With this flag XLA's CPU scheduler starts no operation long before its result is
    # needed; otherwise the zeros that gradients accumulate into add 0.2 GB to the peak.
    # Times differ by less than their noise.
    late = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {late}".strip()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{variant} failed with exit status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(runs: dict) -> dict:
    result: dict = {"rows": ROWS, "length": LENGTH, "dtype": "float32"}
    result["auto_dtype"] = runs["auto"][0]["compute_dtype"]
    for name in VARIANTS:
        seconds = [s for run in runs[name] for s in run["seconds"]]
        middle = statistics.median(seconds)
        result[name] = {
            "seconds": middle,
            "seconds_all": [round(s, 3) for s in seconds],
            "tokens_per_second": 2 * ROWS * LENGTH / middle,
            "peak_gb": max(run["peak_gb"] for run in runs[name]),
            "first_loss": runs[name][0]["losses"][0],
            "last_loss": runs[name][0]["losses"][-1],
            "losses": runs[name][0]["losses"],
        }
        compiles = [r["compile_seconds"] for r in runs[name] if "compile_seconds" in r]
        if compiles:
            result[name]["compile_seconds"] = max(compiles)
        if "temporaries_gb" in runs[name][0]:
            result[name]["temporaries_gb"] = runs[name][0]["temporaries_gb"]
    rates = [run["gflops"] for run in runs["matmul"]]
    result["matmul_gflops"] = {
        k: statistics.median(r[k] for r in rates) for k in rates[0]
    }
    plain, apart, blur, torch, auto, low = (result[name] for name in VARIANTS)
    # The same steps give the same loss, or the comparison means nothing.
    if abs(plain["last_loss"] / torch["last_loss"] - 1) > 1e-3:
        ends = plain["last_loss"], torch["last_loss"]
        raise SystemExit(f"weighted_sum and torch end at different losses, {ends}.")
    for name in ("auto", "torch_bfloat16"):
        ends = result[name]["first_loss"], plain["first_loss"]
        if abs(ends[0] / ends[1] - 1) > BFLOAT16_TOLERANCE:
            raise SystemExit(
                f"{name} and weighted_sum start at different losses, {ends}."
            )
    fastest = min(torch["seconds"], low["seconds"])
    result["ratios"] = {
        "blur_seconds_over_weighted_sum": blur["seconds"] / plain["seconds"],
        "blur_seconds_over_weighted_sum_apart": blur["seconds"] / apart["seconds"],
        "blur_minus_weighted_sum_peak_gb": blur["peak_gb"] - plain["peak_gb"],
        "blur_minus_weighted_sum_temporaries_gb": blur["temporaries_gb"]
        - plain["temporaries_gb"],
        "tokens_per_second_over_torch": torch["seconds"] / plain["seconds"],
        "peak_over_torch": plain["peak_gb"] / torch["peak_gb"],
        "auto_tokens_per_second_over_torchs_best": fastest / auto["seconds"],
        "auto_tokens_per_second_over_float32": plain["seconds"] / auto["seconds"],
        "auto_peak_over_torch_bfloat16": auto["peak_gb"] / low["peak_gb"],
    }
    return result


def _brief(run: dict) -> str:
    if "gflops" in run:
        return ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in run["gflops"].items())
    return f"median {statistics.median(run['seconds']):.2f} s, {run['peak_gb']:.2f} GB"


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps in each process"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes of each variant"
    )
    parser.add_argument("--remat", default="mlp", help="of the float32 variants")
    parser.add_argument("--auto-remat", default="full", help="of the variant auto")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
