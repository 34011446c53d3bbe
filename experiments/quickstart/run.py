# SPDX-License-Identifier: Apache-2.0
"""A real language model forgets the capitals of Europe and keeps the others.

    python -m experiments.quickstart --output runs/quickstart

SmolLM2-135M-Instruct is asked what it knows, unlearns with BLUR-NPO (or another
--method), is asked again in words it was never trained on, and is then attacked:
finetuned on half of the forgotten capitals, does it remember the other half? Writes
quickstart.json, quickstart.png, metrics.jsonl and the unlearned model as a Hugging Face
folder.
"""

import argparse
import json
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
from jaxunlearn.io import hf, log

SIZES = {"forget": 12, "retain": 12, "prose": 4}
RETAIN = {"retain": 1.0, "prose": 1.0}
STEPS = 32
LEARNING_RATE = 4e-5
RELEARN_STEPS = 10
RELEARN_RATE = 2e-5


def blur_npo(model, learning_rate):
    return recipes.blur.npo(
        model, beta=0.1, gamma=0.2, learning_rate=learning_rate, retain=RETAIN
    )


def npo(model, learning_rate):
    return recipes.openunlearning.npo(model, learning_rate=learning_rate, retain=RETAIN)


def graddiff(model, learning_rate):
    return recipes.openunlearning.graddiff(
        model, learning_rate=learning_rate, retain=RETAIN
    )


def ascent(model, learning_rate):
    return recipes.openunlearning.ascent(model, learning_rate=learning_rate)


METHODS = {"blur_npo": blur_npo, "npo": npo, "graddiff": graddiff, "ascent": ascent}


def main(argv: list[str] | None = None) -> dict:
    """Runs the whole story and returns what quickstart.json holds."""
    flags = _flags(argv)
    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    model, params, tokenizer = _load(flags.model)
    print("Asking every capital, in every statement ...")
    task = capitals.make(model, params, tokenizer)
    for kind, known in (("forget", task.forget), ("retain", task.retain)):
        print(f"  {kind}: knows {len(known)} of {task.asked[kind]}")
    before = capitals.score(model, params, tokenizer, task, task.right)
    samples = show.samples(model, params, tokenizer, task)

    print(f"Unlearning with {flags.method}: {flags.steps} steps")
    try:
        unlearned, history, speed = unlearn(model, params, task, flags, output)
    except ju.NotFinite as error:
        raise SystemExit(f"error: {error}") from error
    after = capitals.score(model, unlearned, tokenizer, task)
    print(show.table(task, before, after))
    samples = [
        (*first, second)
        for first, (_, second) in zip(
            samples, show.samples(model, unlearned, tokenizer, task), strict=True
        )
    ]
    print(show.side_by_side(samples))

    print("Attack: relearning half of the forgotten capitals, asking the other half")
    relearned = attack(model, params, unlearned, tokenizer, task, flags.seed)
    print(show.attack(relearned))

    hf.save(model, unlearned, output / "model", tokenizer=tokenizer)
    result = {
        "method": flags.method,
        "seed": flags.seed,
        "steps": flags.steps,
        "seconds": time.perf_counter() - start,
        **speed,
        "versions": _versions(),
        "facts": {
            kind: {"asked": task.asked[kind], "known": len(known)}
            for kind, known in (("forget", task.forget), ("retain", task.retain))
        },
        "before": before,
        "after": after,
        "relearn": relearned,
        "completions": [
            {"prompt": prompt, "before": first, "after": second}
            for prompt, first, second in samples
        ],
    }
    text = json.dumps(log.plain(result), indent=2)
    (output / "quickstart.json").write_text(text + "\n")
    show.plot(result, history, output / "quickstart.png")
    print(f"{result['seconds']:.0f} s in all. Results, plot and model are in {output}/")
    return result


def unlearn(model, params, task, flags, output):
    """Params after unlearning, the log, and the speed of a step, padding counted."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        LEARNING_RATE / 4,
        LEARNING_RATE,
        max(1, flags.steps // 8),
        max(2, flags.steps),
        LEARNING_RATE / 10,
    )
    recipe = METHODS[flags.method](model, learning_rate)
    tables = {name: task.tables[name] for name in SIZES if name in recipe.reads()}
    tables["forget"] = evaluate.reference_logps(model, params, tables["forget"])
    sizes = {name: SIZES[name] for name in tables}

    key = jax.random.key(flags.seed)
    step, state, frozen = recipe.setup(model, params, key=key)
    start = time.perf_counter()
    state, history = ju.fit(
        step,
        state,
        table.streams(tables, sizes, seed=flags.seed),
        frozen,
        steps=flags.steps,
        hooks=[log.JsonLines(output / "metrics.jsonl")],
        progress=True,
    )
    seconds = time.perf_counter() - start
    tokens = sum(sizes[name] * tables[name]["tokens"].shape[1] for name in tables)
    speed = {
        "unlearn_seconds": seconds,
        "tokens_per_second": tokens / float(np.median([e["seconds"] for e in history])),
    }
    return trees.merge(state.params, frozen.params), history, speed


def attack(model, original, unlearned, tokenizer, task, seed):
    """Greedy accuracy, in unseen statements, of the half that the attacker does not
    know."""
    order = np.random.default_rng(seed).permutation(len(task.forget))
    half = len(order) // 2
    trained = [task.forget[i] for i in order[:half]]
    asked = [task.forget[i] for i in order[half:]]
    after, _ = attacks.relearn(
        model,
        unlearned,
        capitals.statements_table(tokenizer, trained),
        steps=RELEARN_STEPS,
        learning_rate=RELEARN_RATE,
        seed=seed,
        progress=True,
    )
    accuracy = {
        name: capitals.completion(model, params, tokenizer, asked, "unseen")
        for name, params in (
            ("original", original),
            ("unlearned", unlearned),
            ("relearned", after),
        )
    }
    return {
        "facts_trained": len(trained),
        "facts_asked": len(asked),
        **accuracy,
        "trained_half": capitals.completion(model, after, tokenizer, trained, "unseen"),
    }


def _load(path):
    """Model, params and tokenizer; a path that will not load ends the program."""
    try:
        path = hf.smollm2_path() if path is None else path
        print(f"Loading {path}")
        model, params, tokenizer = hf.load(path)
        if tokenizer is None:
            raise ValueError(
                f"The quickstart needs a model with a tokenizer, got {path} without "
                "one. Add its tokenizer.json to the folder."
            )
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return model, params, tokenizer


def _versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "transformers")
    own = {"python": platform.python_version(), "jaxunlearn": ju.__version__}
    return own | {name: metadata.version(name) for name in names}


def _flags(argv):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--output", default="runs/quickstart", help="folder for results"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="unlearning steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=sorted(METHODS), default="blur_npo")
    parser.add_argument(
        "--model",
        help="Hugging Face folder or .gguf file instead of SmolLM2-135M-Instruct",
    )
    flags = parser.parse_args(argv)
    if flags.steps < 1 or flags.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")
    return flags


if __name__ == "__main__":
    main()
