# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one unlearning step: BLUR, weighted sum, and plain torch.

    python -m experiments.benchmarks.step --output runs/step.json

NPO on 4 forget sequences plus NLL on 4 retain sequences of 128 tokens, SmolLM2-135M,
float32, AdamW. Every variant runs in processes of its own, in turns, so that the peak
resident memory is its own and a machine that drifts drifts for all. Medians over all
steps of all rounds. One such run on two CPU cores is kept in
experiments/benchmarks/results/step_smollm2_cpu.json.
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

ROWS, LENGTH, WARM_UP = 4, 128, 1
PARTS = ("forget/loss", "retain/loss")  # of the variants whose terms stand apart
VARIANTS = ("weighted_sum", "weighted_sum_apart", "blur", "torch")


def main(argv: list[str] | None = None) -> dict:
    """Measures every variant and prints and writes the figures."""
    flags = _flags(argv)
    if flags.variant:
        print(json.dumps(_one(flags)), flush=True)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        _child("prepare", folder, flags)
        runs = {name: [] for name in (*VARIANTS, "matmul")}
        for _ in range(flags.rounds):
            for name in runs:
                runs[name].append(_child(name, folder, flags))
                print(f"{name}: {_brief(runs[name][-1])}", flush=True)
    result = _summary(runs)
    print(json.dumps(result, indent=2))
    if flags.output:
        path = Path(flags.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _one(flags) -> dict:
    """What one child process measures."""
    if flags.variant == "prepare":
        return _prepare(Path(flags.folder))
    if flags.variant == "matmul":
        return _matmul()
    if flags.variant == "torch":
        from experiments.benchmarks import torch_step

        return torch_step.measure(Path(flags.folder), WARM_UP + flags.steps)
    return _jax(flags)


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


def _jax(flags) -> dict:
    import jax
    import numpy as np
    import optax

    import jaxunlearn as ju
    from jaxunlearn import combine, recipes
    from jaxunlearn.io import hf

    model, params, _ = hf.load(Path(flags.folder) / "model", remat=flags.remat)
    together = recipes.openunlearning.npo(model, clip=None, weight_decay=0.01)
    blur = recipes.blur.npo(model, gamma=0.1)
    adamw = optax.adamw(1e-5, weight_decay=0.01)
    apart = blur._replace(tx=optax.chain(combine.weighted_sum(), adamw))
    recipe = {
        "weighted_sum": together,  # one joint term: one forward pass, one gradient tree
        "weighted_sum_apart": apart,  # BLUR's own terms, gradients merely added
        "blur": blur,
    }[flags.variant]
    saved = np.load(Path(flags.folder) / "batch.npz")
    streams = {
        name: {"tokens": saved[name], "mask": np.ones((ROWS, LENGTH), np.bool_)}
        for name in ("forget", "retain")
    }
    streams["forget"]["ref_logps"] = saved["ref_logps"]
    state = ju.init_state(params, recipe.tx, jax.random.key(0))
    del params
    start = time.perf_counter()
    step = jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0)
    compiled = step.lower(state, streams, ju.Frozen()).compile()
    compile_seconds = time.perf_counter() - start
    # What compiling left in the heap would otherwise count beside the step.
    ctypes.CDLL(None).malloc_trim(0)
    seconds = []
    for _ in range(WARM_UP + flags.steps):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, streams, ju.Frozen()))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return {
        "seconds": seconds[WARM_UP:],
        "compile_seconds": compile_seconds,
        "peak_gb": peak_gb(),
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "loss": sum(
            float(v) for k, v in metrics.items() if k in ("total/loss", *PARTS)
        ),
    }


def _matmul() -> dict:
    """float32 GFLOP/s of jax at the shapes of the model's own products."""
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


def _child(variant: str, folder: str, flags) -> dict:
    command = [sys.executable, "-m", "experiments.benchmarks.step"]
    command += ["--variant", variant, "--folder", folder]
    command += ["--steps", str(flags.steps), "--remat", flags.remat]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    # One heap for all threads, in every variant: what a compiler or a loader frees is
    # used again instead of staying resident, and the peak is that of the step.
    environment["MALLOC_ARENA_MAX"] = "1"
    # XLA's CPU scheduler then starts nothing long before it is needed; the zeros that
    # gradients accumulate into are 0.2 GB of the peak otherwise. Times differ by less
    # than their noise.
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
    for name in VARIANTS:
        seconds = [s for run in runs[name] for s in run["seconds"]]
        middle = statistics.median(seconds)
        result[name] = {
            "seconds": middle,
            "seconds_all": [round(s, 3) for s in seconds],
            "tokens_per_second": 2 * ROWS * LENGTH / middle,
            "peak_gb": max(run["peak_gb"] for run in runs[name]),
            "last_loss": runs[name][0]["loss"],
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
    plain, apart, blur, torch = (result[name] for name in VARIANTS)
    # The same number of the same steps: the same loss, or the comparison means nothing.
    if abs(plain["last_loss"] / torch["last_loss"] - 1) > 1e-3:
        ends = plain["last_loss"], torch["last_loss"]
        raise SystemExit(f"Not the same steps: weighted_sum and torch end at {ends}.")
    result["ratios"] = {
        "blur_seconds_over_weighted_sum": blur["seconds"] / plain["seconds"],
        "blur_seconds_over_weighted_sum_apart": blur["seconds"] / apart["seconds"],
        "blur_minus_weighted_sum_peak_gb": blur["peak_gb"] - plain["peak_gb"],
        "blur_minus_weighted_sum_temporaries_gb": blur["temporaries_gb"]
        - plain["temporaries_gb"],
        "tokens_per_second_over_torch": torch["seconds"] / plain["seconds"],
        "peak_over_torch": plain["peak_gb"] / torch["peak_gb"],
    }
    return result


def _brief(run: dict) -> str:
    if "gflops" in run:
        return ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in run["gflops"].items())
    return f"median {statistics.median(run['seconds']):.2f} s, {run['peak_gb']:.2f} GB"


def _flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps in each process"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes of each variant"
    )
    parser.add_argument("--remat", default="mlp")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
