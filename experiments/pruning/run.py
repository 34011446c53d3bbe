# SPDX-License-Identifier: Apache-2.0
"""Selective pruning (2403.01267): take code away and keep English, and the other way.

    python -m experiments.pruning.run --config=experiments/pruning/config.py

MLP neurons go a little at a time. What goes is decided by

* selective: the mean of |activation| on the text to forget over that on the text to
  keep, looked at anew before every step, over all layers together;
* magnitude: the smallest norm of all of a neuron's weights, over all layers together;
* random: as many in each layer, without repetition.

The last two know no text, so that one run of theirs serves both directions. After every
step the share of next tokens of both texts that are the likeliest one is measured, on
parts of the texts that no statistic has seen.

One line of JSON a step, in `<output>/prune.jsonl`, and the masks beside it: stopped at
any time, the same command goes on. Writes results/prune_smollm2.json, .md and .png;
--draw only that, from the lines there are.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments.comparison import run as compare
from experiments.pruning import figures as prune_figures
from experiments.pruning import texts as prune_texts
from jaxunlearn import _checks, data, edits, evaluate, models, stats, trees
from jaxunlearn.data import table as tables
from jaxunlearn.io import hf
from jaxunlearn.typing import Array, Model, Params
from jaxunlearn.workflows.evaluation import folder as folders

RESULTS = Path(__file__).resolve().parent / "results" / "smollm2"
SITE = "mlp"
SIDES = ("code", "prose")


class Text(NamedTuple):
    """Rows of one text: those to look at, and those to score."""

    seen: tables.Table
    scored: tables.Table


class Run(NamedTuple):
    """One trajectory; `forget` is "" where no text decides."""

    method: str
    forget: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        return "-".join(str(x) for x in self if x != "")


def defaults() -> ConfigDict:
    """Every setting of the experiment."""
    return ConfigDict(
        {
            "model": "smollm2",  # or a path for hf.load
            "output": "runs/prune",
            "data": "",  # folder of the data sets, as JAXUNLEARN_DATA
            "length": 256,  # tokens of a row
            "batch": 4,  # rows in memory at a time
            "first": 20480,  # tokens of each text, at most, looked at before step 1
            "again": 2048,  # and before every later step
            "scored": 2048,  # tokens of each text that are scored
            "fraction": 0.02,  # of all neurons, a step
            "steps": 6,
            "eps": 1e-3,
            "seeds": (0,),  # of random pruning
        }
    )


def read(config: ConfigDict, tokenizer: Any) -> tuple[dict[str, Text], dict[str, str]]:
    """(side -> its rows, side -> where the text is from)."""
    found, origin = {}, {}
    for side, (texts, where) in {
        "code": prune_texts.code(),
        "prose": prune_texts.english(config.data),
    }.items():
        parts = []
        sizes = ((config.again, config.first), (config.scored, config.scored))
        for text, (least, most) in zip(texts, sizes, strict=True):
            rows = data.encode_text(tokenizer, text, length=config.length)
            if len(rows["tokens"]) < least // config.length:
                raise ValueError(
                    f"The experiment needs {least} tokens of {side}, got "
                    f"{rows['tokens'].size} from {where}. Ask for fewer."
                )
            parts.append({k: x[: most // config.length] for k, x in rows.items()})
        found[side], origin[side] = Text(*parts), where
    return found, origin


def prune(
    model: Model,
    params: Params,
    texts: Mapping[str, Text],
    config: ConfigDict,
    about: Mapping[str, Any],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> list[compare.Line]:
    """All lines of the experiment, those that are missing run now.

    Args:
        model, params: what is pruned.
        texts: of `read`.
        config: sizes, steps and the folder of results.
        about: what the lines have in common; another's file is refused.
        say: gets a line for every step.
    Raises:
        ValueError: if the file is of another config or model, or a size is wrong.
    """
    _check(config)
    folder = Path(config.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prune.jsonl"
    head = {"key": "head"} | dict(about)
    lines = compare.read(file, head)

    def add(line):
        lines.append(line)
        compare.add(file, line)
        say(f"{line['key']}: " + ", ".join(f"{s} {line[s]:.3f}" for s in SIDES))

    if not file.exists():
        compare.add(file, head)
    if not lines:
        add({"key": "step 0", "step": 0} | accuracies(model, params, texts, config))
    todo = [Run("selective", side) for side in SIDES] + [Run("magnitude")]
    todo += [Run("random", "", seed) for seed in config.seeds]
    looked = None  # at the whole model: once for both directions
    for step in range(1, config.steps + 1):
        for run in todo:
            key, masks = f"{run.key} {step}", folder / f"{run.key}.npy"
            if key in {line["key"] for line in lines}:
                continue
            gone = jnp.asarray(np.load(masks)) if step > 1 else None
            line = {"key": key, **run._asdict(), "step": step}
            seen = {}
            if run.forget:
                if gone is None:
                    looked = looked or activities(model, params, texts, config, step)
                    seen, spent = looked
                else:
                    now = edits.prune_units(model, params, {SITE: gone})
                    seen, spent = activities(model, now, texts, config, step)
                line |= spent
            start = time.perf_counter(), time.process_time()
            gone = choose(model, params, run, config, seen, gone, step)
            line["choose_seconds"] = time.perf_counter() - start[0]
            line["choose_core_seconds"] = time.process_time() - start[1]
            pruned = edits.prune_units(model, params, {SITE: gone})
            line["removed"] = float(jnp.mean(gone))
            line |= accuracies(model, pruned, texts, config)
            np.save(masks, np.asarray(gone))
            add(line)
    return lines


def choose(model, params, run, config, seen, gone, step) -> Array:
    """The units that are gone after this step."""
    site = model.sites[SITE]
    if run.method == "selective":
        (keep,) = set(SIDES) - {run.forget}
        scores = edits.unit_scores(
            forget=seen[run.forget].abs, retain=seen[keep].abs, eps=config.eps
        )
    elif run.method == "magnitude":
        scores = -magnitude(model, params)
    else:
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        scores = jax.random.uniform(key, (site.layers, site.units))
    gone = edits.select_units(
        scores, config.fraction, removed=gone, per_layer=run.method == "random"
    )
    return jax.block_until_ready(gone)


def activities(model, params, texts, config, step) -> tuple[Any, dict[str, float]]:
    """(side -> statistics of its rows to look at, what they took)."""
    tokens, found, spent = config.first if step == 1 else config.again, {}, {}
    for side, text in texts.items():
        rows = {name: x[: tokens // config.length] for name, x in text.seen.items()}
        start = time.perf_counter(), time.process_time()
        batches = (
            {**batch, "mask": batch["mask"] & batch["valid"][:, None]}
            for batch in tables.eval_batches(rows, config.batch)
        )
        found[side] = stats.activity(model, params, batches, (SITE,))[SITE]
        jax.block_until_ready(found[side])
        spent[f"statistics_seconds_{side}"] = time.perf_counter() - start[0]
        spent[f"statistics_core_seconds_{side}"] = time.process_time() - start[1]
        spent[f"statistics_tokens_{side}"] = int(found[side].count)
    return found, spent


def accuracies(model, params, texts, config) -> dict[str, float]:
    """Side -> share of its next tokens that are the likeliest one, and the seconds."""
    start, found = time.perf_counter(), {}
    for side, text in texts.items():
        scores = evaluate.token_scores(
            model, params, text.scored, batch_size=config.batch
        )
        found[side] = float(scores.hits[scores.where].mean())
    return found | {"accuracy_seconds": time.perf_counter() - start}


def magnitude(model: Model, params: Params) -> Array:
    """[N, units] norm of all weights of each neuron: those into it and those out."""
    site = model.sites[SITE]
    leaves = trees.paths(params)
    squares = jnp.sum(jnp.square(leaves[site.reader]), axis=2 - site.axis)
    for path in site.writers:
        squares = squares + jnp.sum(jnp.square(leaves[path]), axis=1)
    return jnp.sqrt(squares)


def checks(model: Model, params: Params, gone: Array, text: Text) -> dict[str, Any]:
    """How far pruned weights are from masked activations, and what removal gains.

    Returns:
        `gap`, the largest difference of logits over the largest logit; `width`, neurons
        a layer before and after `edits.remove_units`; `seconds` of a forward pass over
        the scored rows before and after, compiled.
    """
    batch = {name: jnp.asarray(text.scored[name][:1]) for name in ("tokens", "mask")}

    def mask(value, layer):
        return jnp.where(gone[layer], 0, value)

    pruned = edits.prune_units(model, params, {SITE: gone})
    wanted, found = (
        model.unembed(p, model.apply(p, batch, edits=edit).hidden)
        for p, edit in ((params, {SITE: mask}), (pruned, {}))
    )
    small = edits.remove_units(model, pruned, {SITE: gone}, pad=True)
    smaller, seconds = models.resized(model, small), []
    for own, weights in ((model, params), (smaller, small)):
        run = jax.jit(lambda p, b, own=own: own.apply(p, b).hidden)
        whole = {name: text.scored[name] for name in ("tokens", "mask")}
        jax.block_until_ready(run(weights, whole))
        start = time.perf_counter()
        jax.block_until_ready(run(weights, whole))
        seconds.append(time.perf_counter() - start)
    return {
        "gap": float(jnp.max(jnp.abs(wanted - found)) / jnp.max(jnp.abs(wanted))),
        "width": [model.sites[SITE].units, smaller.sites[SITE].units],
        "seconds": seconds,
    }


def _check(config: ConfigDict) -> None:
    owner = "The pruning experiment"
    for name in config:
        _checks.one_of(owner, list(defaults()), key=name)
    names = ("length", "batch", "first", "again", "scored", "steps")
    _checks.positive_int(owner, **{name: config[name] for name in names})
    _checks.positive(owner, fraction=config.fraction, eps=config.eps)
    short = [x for x in ("first", "again", "scored") if config[x] < config.length]
    if short or config.again > config.first or config.fraction * config.steps > 1:
        raise ValueError(
            f"{owner} needs length <= again <= first, length <= scored and fraction * "
            f"steps <= 1, got length={config.length}, again={config.again}, "
            f"first={config.first}, scored={config.scored}, "
            f"fraction={config.fraction}, steps={config.steps}."
        )


def head(config: ConfigDict, origin: Mapping[str, str]) -> dict[str, Any]:
    """What the lines of a file have in common; more steps and seeds may follow."""
    apart = ("output", "data", "steps", "seeds")
    plain = {k: v for k, v in config.to_dict().items() if k not in apart}
    return {"config": plain, "texts": dict(origin)}


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes prune_smollm2.json, .md and .png."""
    del argv
    config = flags.FLAGS.config
    folder = Path(config.output).expanduser()
    extra = None
    try:
        _check(config)
        if flags.FLAGS.draw:
            about, lines = compare.drawn(folder / "prune.jsonl")
            del about["key"]
        else:
            model, params, tokenizer = hf.load(config.model, remat="none")
            folders.check_tokenizer(tokenizer, config.model)
            texts, origin = read(config, tokenizer)
            about = head(config, origin)
            lines = prune(model, params, texts, config, about, say=_say)
            gone = jnp.asarray(np.load(folder / "selective-code-0.npy"))
            extra = checks(model, params, gone, texts["prose"])
        neurons = np.load(folder / "selective-code-0.npy").shape
    except (OSError, ValueError, KeyError) as error:
        _say(f"error: {error}")
        raise SystemExit(2) from error
    about |= compare.made_by("experiments.pruning.run")
    about |= {"neurons": list(neurons), "checks": extra}
    prune_figures.write(lines, about, RESULTS)
    print(f"Wrote {RESULTS}.json, .md and .png")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
