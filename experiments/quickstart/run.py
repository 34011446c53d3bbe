# SPDX-License-Identifier: Apache-2.0
"""A real language model forgets the capitals of Europe and keeps the others.

    python -m experiments.quickstart --output runs/quickstart

1. Evaluate which capitals SmolLM2-135M-Instruct knows.
2. Unlearn those of Europe with BLUR-NPO (or another --method).
3. Evaluate again, in wording that training never saw.
4. Attack: finetune on half of the forgotten capitals and evaluate the other half.

Writes quickstart.json, quickstart.png, metrics.jsonl (one line a step) and the
unlearned model as a Hugging Face folder.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import optax

import jaxunlearn as ju
from experiments.quickstart import capitals, show
from jaxunlearn import attacks, evaluate, recipes, trees
from jaxunlearn.data import table
from jaxunlearn.io import compilation_cache, hf, log

BATCH_SIZES = {"forget": 12, "retain": 12, "prose": 4}
RETAIN = {"retain": 1.0, "prose": 1.0}  # weights of the retain losses
STEPS, LEARNING_RATE = 32, 4e-5
RELEARN_STEPS, RELEARN_RATE = 10, 2e-5


def make_recipe(method: str, model, learning_rate) -> recipes.Recipe:
    """The recipe of a method with the quickstart's retain streams."""
    rate = dict(learning_rate=learning_rate)
    if method == "blur_npo":
        return recipes.blur.npo(model, beta=0.1, gamma=0.2, retain=RETAIN, **rate)
    if method == "ascent":
        return recipes.openunlearning.ascent(model, **rate)
    return getattr(recipes.openunlearning, method)(model, retain=RETAIN, **rate)


METHODS = ("ascent", "blur_npo", "graddiff", "npo")


def main(argv: list[str] | None = None) -> dict:
    """Runs the four steps and returns what quickstart.json holds."""
    options = parse(argv)
    if options.no_compilation_cache:
        compilation_cache.disable()
    else:
        compilation_cache.enable()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    phases = Phases()

    model, params, tokenizer = load(options.model)
    phases.end("load")
    print("Evaluating every capital in several statements ...")
    task = capitals.make_task(model, params, tokenizer)
    for name, known in task.facts.items():
        print(f"  {name}: the model knows {len(known)} of {task.num_evaluated[name]}")
    before = capitals.score(model, params, tokenizer, task, task.hits)
    texts_before = show.completions(model, params, tokenizer, task)
    phases.end("evaluate before")

    print(f"Unlearning with {options.method}: {options.steps} steps")
    print(f"Computing in {model.config.compute_dtype}")
    recipe, tables = plan(model, params, task, options)
    setup = recipe.setup(model, params, key=jax.random.key(options.seed))
    del params  # the state has its copy
    try:
        unlearned, history, speed = train(setup, tables, options, output)
    except ju.NotFinite as error:
        raise SystemExit(f"error: {error}") from error
    del setup
    hf.save(model, unlearned, output / "model", tokenizer=tokenizer)
    phases.end("unlearn")
    hits = capitals.task_hits(model, unlearned, tokenizer, task)
    after = capitals.score(model, unlearned, tokenizer, task, hits)
    texts_after = show.completions(model, unlearned, tokenizer, task)
    samples = [
        {"prompt": prompt, "before": first, "after": second}
        for (prompt, first), (_, second) in zip(texts_before, texts_after, strict=True)
    ]
    print(show.samples(samples))
    phases.end("evaluate after")

    print("Attack: finetuning on half of the forgotten capitals, evaluating the others")
    relearn = relearn_attack(model, unlearned, tokenizer, task, hits, options.seed)
    phases.end("attack")

    result = {
        "method": options.method,
        "seed": options.seed,
        "steps": options.steps,
        "seconds": phases.seconds,
        "phases": phases.found,
        **speed,
        "compute_dtype": model.config.compute_dtype,
        "versions": versions(),
        "facts": {
            name: {"evaluated": task.num_evaluated[name], "known": len(known)}
            for name, known in task.facts.items()
        },
        "before": before,
        "after": after,
        "relearn": relearn,
        "completions": samples,
    }
    text = json.dumps(log.plain(result), indent=2)
    (output / "quickstart.json").write_text(text + "\n", encoding="utf-8")
    show.plot(result, history, output / "quickstart.png")
    print(show.score_table(task, before, after))
    print(show.attack(relearn))
    print(f"Finished in {result['seconds']:.0f} s. Results are in {output}/")
    return result


def plan(model, params, task, options):
    """(the recipe, the tables of its streams with reference log-probabilities)."""
    schedule = optax.warmup_cosine_decay_schedule(
        LEARNING_RATE / 4,
        LEARNING_RATE,
        max(1, options.steps // 8),
        max(2, options.steps),
        LEARNING_RATE / 10,
    )
    recipe = make_recipe(options.method, model, schedule)
    names = recipe.reads()  # the streams that its terms read
    tables = {name: task.tables[name] for name in BATCH_SIZES if name in names}
    # NPO compares with the original model: its log-probabilities are a column.
    tables["forget"] = evaluate.reference_logps(
        model, params, tables["forget"], batch_size=capitals.BATCH_SIZE
    )
    return recipe, tables


def train(setup, tables, options, output):
    """Unlearns the forget table.

    Args:
        setup: of the recipe; its state is donated.
        tables: stream -> table.
        options: the command line.
        output: folder of metrics.jsonl.
    Returns:
        (params, log of every step, {"unlearn_seconds", "tokens_per_second"}); the
        tokens include padding.
    """
    step, state, frozen = setup
    sizes = {name: BATCH_SIZES[name] for name in tables}
    start = time.perf_counter()
    # Compiled before the first step, so that the compiler's memory is free during it.
    streams = table.streams(tables, sizes, seed=options.seed)
    step = step.lower(state, next(iter(streams)), frozen).compile()
    trim_memory()
    state, history = ju.fit(
        step,
        state,
        table.streams(tables, sizes, seed=options.seed),
        frozen,
        steps=options.steps,
        hooks=[log.JsonLines(output / "metrics.jsonl")],
        progress=True,
    )
    seconds = time.perf_counter() - start
    tokens = sum(sizes[name] * tables[name]["tokens"].shape[1] for name in tables)
    step_seconds = float(np.median([entry["seconds"] for entry in history]))
    speed = {"unlearn_seconds": seconds, "tokens_per_second": tokens / step_seconds}
    return trees.merge(state.params, frozen.params), history, speed


def relearn_attack(model, unlearned, tokenizer, task, hits, seed):
    """Finetunes the unlearned model on half of the forgotten facts.

    Args:
        model, unlearned, tokenizer: what is attacked.
        task: the facts, with the hits of the original model.
        hits: `capitals.task_hits` of the unlearned model.
        seed: picks the half and orders its rows.
    Returns:
        Completion accuracy, in unseen statements, over the other half for the original,
        the unlearned and the attacked model, and over the half that was trained on.
    """
    forget = task.facts["forget"]
    order = np.random.default_rng(seed).permutation(len(forget))
    trained, others = np.split(order, [len(order) // 2])
    relearned, _ = attacks.relearn(
        model,
        unlearned,
        capitals.statements_table(tokenizer, [forget[i] for i in trained]),
        steps=RELEARN_STEPS,
        learning_rate=RELEARN_RATE,
        seed=seed,
        progress=True,
    )
    attacked = capitals.completion_hits(model, relearned, tokenizer, forget, ["unseen"])

    def accuracy(hits, facts):
        return float(hits["unseen"][facts].mean())

    return {
        "facts_trained": len(trained),
        "facts_evaluated": len(others),
        "original": accuracy(task.hits["forget"], others),
        "unlearned": accuracy(hits["forget"], others),
        "relearned": accuracy(attacked, others),
        "trained_half": accuracy(attacked, trained),
    }


def trim_memory() -> None:
    """Returns freed memory to the system, which glibc does not do by itself: after a
    compilation it keeps about 0.4 GB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name != "nt" else None
    if trim is not None:
        trim(0)


class Phases:
    """Seconds of each phase, and the peak resident memory of the process so far.

    Attributes:
        found: {phase: {"seconds", "peak_gigabytes"}}; the peak is None on systems
            without Python's module `resource`.
    """

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.found: dict[str, dict[str, float | None]] = {}

    @property
    def seconds(self) -> float:
        """From the start until the end of the last phase."""
        return self._last - self._start

    def end(self, name: str) -> None:
        """Ends the phase that began at the end of the last one."""
        now = time.perf_counter()
        entry = {"seconds": now - self._last, "peak_gigabytes": peak_gigabytes()}
        self.found[name], self._last = entry, now
        trim_memory()


def peak_gigabytes() -> float | None:
    """The largest resident memory of this process so far, 1e9 bytes."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def load(path):
    """Model, params and tokenizer; a path that does not load ends the program."""
    try:
        path = hf.smollm2_path() if path is None else path
        print(f"Loading {path}")
        model, params, tokenizer = hf.load(path, compute_dtype="auto")
        if tokenizer is None:
            raise ValueError(
                f"The quickstart needs a model with a tokenizer, got {path} without "
                "one. Add its tokenizer.json to the folder."
            )
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return model, params, tokenizer


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries it uses."""
    names = ("jax", "flax", "optax", "transformers")
    found = {"python": platform.python_version(), "jaxunlearn": ju.__version__}
    return found | {name: metadata.version(name) for name in names}


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--output", default="runs/quickstart", help="folder for results"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="unlearning steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, default="blur_npo")
    parser.add_argument(
        "--model",
        help="Hugging Face folder or .gguf file instead of SmolLM2-135M-Instruct",
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="keep no compiled programs in the user's cache folder",
    )
    options = parser.parse_args(argv)
    if options.steps < 1 or options.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")
    return options


if __name__ == "__main__":
    main()
