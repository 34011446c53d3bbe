# SPDX-License-Identifier: Apache-2.0
"""Does rounding an unlearned model bring the forgotten back? (2410.16454)

    python -m experiments.quantization.run \\
        --config=experiments/small/configs/biographies.py

Methods without and with a retain term, and SURE around the same losses, unlearn in the
small world; each model is then asked as it is and rounded to 8, 4 and 3 bits. The claim
is about weights that hardly move, so a method runs at the lowest of RATES at which it
forgets on the first seed (mean probability of the forgotten answers at most FORGOTTEN),
then on all seeds. Where no rate does, the one that forgets most is taken, and the table
says so.

Everything runs twice: with float32 masters, and with weights, gradients and moments in
bfloat16 alone, as the paper's code trains, where a step smaller than half the distance
to the next bfloat16 number is lost. Both compute in float32, and weights are widened to
float32 before they are rounded to few bits.

One line of JSON a run, in `<output>/<world>.quantize.jsonl`: stopped at any time, the
same command goes on. Writes results/quantize_small.json, .md and .png; --draw only
that.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.comparison import run as compare
from experiments.quantization import figures as quantize_figures
from experiments.small import score, unlearn, world
from experiments.small.methods import Method
from jaxunlearn import edits, recipes, trees
from jaxunlearn.typing import Params

RATES = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
STEPS, ROWS = 30, 8
FORGOTTEN = 0.1
ASKED = {"forget": 24, "retain": 24}
GROUP = 64  # divides 256 and 704 inputs, which 128 does not
CALIBRATION = 64  # rows to keep, 48 tokens each
DTYPES = ("float32", "bfloat16")
LINEAR = r"blocks/.*/kernel"  # what edits.quantize rounds
RESULTS = Path(__file__).resolve().parent / "results" / "small"

OU, SURE = recipes.openunlearning, recipes.sure
# SURE's percentile with its base's own weights: what differs is the mask alone.
PLAIN = dict(alpha=1.0, percentile=90.0)
RECIPES: Mapping[str, Callable[..., Any]] = {
    "GA": OU.ascent,
    "GA + NLL": OU.graddiff,
    "NPO": partial(OU.npo, alpha=0.0),
    "NPO + KL": partial(OU.npo, retain_loss="kl"),
    "SURE GA + NLL": partial(SURE.graddiff, **PLAIN),
    "SURE NPO + KL": partial(SURE.npo, **PLAIN),
    "SURE NPO + KL, modules once": partial(
        SURE.npo, **PLAIN, unit="module", refresh="once"
    ),
}

Quantizer = Callable[[Params], Params]


class Plan(NamedTuple):
    """What is run, and how large."""

    rates: Sequence[float] = RATES
    seeds: Sequence[int] = SEEDS
    steps: int = STEPS
    rows: int = ROWS
    asked: Mapping[str, int] = MappingProxyType(ASKED)
    dtypes: Sequence[str] = DTYPES
    group: int = GROUP


class Run(NamedTuple):
    """One run: what it is known by in the file of results."""

    method: str
    dtype: str
    rate: float
    seed: int
    rounded: bool

    @property
    def key(self) -> str:
        kind = "rounded" if self.rounded else "sweep"
        return f"{kind} {self.method} {self.dtype} {self.rate:.3g} {self.seed}"


def quantizers(small: world.World, group: int) -> dict[str, Quantizer]:
    """Name -> float32 params to rounded ones; the first leaves them as they are."""
    kept = small.table("retain")
    rows = {name: kept[name][:CALIBRATION] for name in ("tokens", "mask")}
    gptq = partial(edits.gptq, small.model, batches=[rows], group=group)
    return {
        "full": lambda params: params,
        "int8": partial(edits.quantize, kind="int8"),
        "int4": partial(edits.quantize, kind="int4", group=group),
        "int4_tensor": partial(
            edits.quantize, kind="int4", group="tensor", scheme="symmetric_full"
        ),
        "fp4": partial(edits.quantize, kind="fp4"),
        "nf4": partial(edits.quantize, kind="nf4"),
        "gptq4": partial(gptq, kind="int4"),
        "int3": partial(edits.quantize, kind="int3", group=group),
    }


def compare_precisions(
    small: world.World,
    file: Path,
    *,
    known: Mapping[str, Callable[..., Any]] = RECIPES,
    plan: Plan | None = None,
    progress: bool = False,
) -> list[compare.Line]:
    """All lines of the experiment, those that `file` lacks run now and added to it.

    Args:
        small: where the methods run.
        file: JSON lines; those of another world or plan are an error.
        known: recipes by name.
        plan: rates, seeds and sizes; Plan() if None.
        progress: whether to show a bar.
    Raises:
        ValueError: if the file is of another world or plan.
    """
    plan = Plan() if plan is None else plan
    lines = compare.read(file, head(small, plan))
    judge = score.scorer(small, rows=plan.asked)
    rounding = quantizers(small, plan.group)
    if not file.exists():
        compare.add(file, head(small, plan))
    for name, params in (("untouched", small.params), ("twin", small.retrained)):
        for dtype in plan.dtypes:
            key = f"{name} {dtype}"
            if key in {line["key"] for line in lines}:
                continue
            own = cast(params, dtype)
            line = {"key": key, "method": name, "dtype": dtype}
            lines.append(line | measured(judge, rounding, own))
            compare.add(file, lines[-1])
    bar = tqdm(disable=not progress, unit="run", dynamic_ncols=True, file=sys.stderr)
    for dtype in plan.dtypes:
        inside = small._replace(params=cast(small.params, dtype))
        streams = unlearn.tables(inside)
        for name, function in known.items():
            made = None
            for run in _runs(name, dtype, plan, lines):
                bar.set_postfix_str(run.key)
                if made is None:
                    method = Method(name, 0.0, _built(function))
                    sizes = dict(steps=plan.steps, batch_size=plan.rows)
                    made = unlearn.runner(inside, method, streams, **sizes)
                params, about = unlearn.run(made, rate=run.rate, seed=run.seed)
                line = {"key": run.key, **run._asdict(), **about}
                line |= moved(inside.params, params, plan.group)
                used = rounding if run.rounded else {"full": rounding["full"]}
                lines.append(line | measured(judge, used, params))
                compare.add(file, lines[-1])
                bar.update()
    bar.close()
    return lines


def measured(
    judge: score.Scorer, rounding: Mapping[str, Quantizer], params: Params
) -> dict[str, Any]:
    """By quantizer what score says, and the probability of each forgotten answer."""
    wide, scores, rows = cast(params, "float32"), {}, {}
    for name, function in rounding.items():
        found = score.per_row(judge, function(wide))
        scores[name] = score.summary_of(judge, found)
        rows[name] = found["forget"]["probability"].tolist()
    return {"scores": scores, "rows": rows}


def moved(before: Params, after: Params, group: int) -> dict[str, float]:
    """How far linear kernels moved, by the steps of their int4 grid before.

    Returns:
        `steps`, the mean of |change| in steps; `codes`, the fraction of weights whose
        nearest code on that grid is another one: these alone change the 4-bit model.
    """
    own = trees.paths(trees.split(before, LINEAR)[0])
    found = [_moved(x, trees.paths(after)[path], group) for path, x in own.items()]
    count = sum(x.size for x in own.values())
    totals = [float(sum(each)) / count for each in zip(*found, strict=True)]
    return dict(zip(("steps", "codes"), totals, strict=True))


@partial(jax.jit, static_argnames="group")
def _moved(before, after, group):
    def blocks(x):
        return x.astype(jnp.float32).reshape(len(x), -1, group, x.shape[-1])

    a, b = blocks(before), blocks(after)
    step = jnp.max(jnp.abs(a), 2, keepdims=True) / 7
    step = jnp.where(step > 0, step, 1)
    codes = [jnp.clip(jnp.round(x / step), -8, 7) for x in (a, b)]
    return jnp.sum(jnp.abs(b - a) / step), jnp.sum(codes[0] != codes[1])


def rate_of(lines: Sequence[compare.Line], name: str, dtype: str, plan: Plan):
    """(the rate a method runs at, whether it forgets there), (None, False) until the
    sweep has come so far."""
    own = {
        line["rate"]: line
        for line in lines
        if (line["method"], line["dtype"]) == (name, dtype)
        and line.get("rounded") is False
    }
    for rate in plan.rates:
        if rate in own and _forgets(own[rate]):
            return rate, True
    if all(rate in own for rate in plan.rates):
        return min(own, key=lambda rate: _probability(own[rate])), False
    return None, False


def _runs(name: str, dtype: str, plan: Plan, lines) -> Iterator[Run]:
    """What is missing, one after another: rates upwards, then every seed."""

    def missing(run):
        return run.key not in {line["key"] for line in lines}

    for rate in plan.rates:
        if rate_of(lines, name, dtype, plan)[0] is not None:
            break
        run = Run(name, dtype, rate, plan.seeds[0], False)
        if missing(run):
            yield run
    rate, _ = rate_of(lines, name, dtype, plan)
    for seed in plan.seeds:
        run = Run(name, dtype, rate, seed, True)
        if missing(run):
            yield run


def _forgets(line) -> bool:
    return line["finite"] and _probability(line) <= FORGOTTEN


def _probability(line) -> float:
    return line["scores"]["full"]["forget_probability"]


def _built(function):
    return lambda model, rate: function(model, learning_rate=rate)


def cast(params: Params, dtype: str) -> Params:
    """params in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def head(small: world.World, plan: Plan) -> compare.Line:
    """What the lines of a file have in common; its first line."""
    sizes = dict(steps=plan.steps, rows=plan.rows, asked=dict(plan.asked))
    sizes |= dict(rates=list(plan.rates), seeds=list(plan.seeds), group=plan.group)
    return {"key": "head", "world": small.digest, **sizes}


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes quantize_small.json, .md and .png."""
    del argv
    config, plan = flags.FLAGS.config, Plan()
    try:
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.quantize.jsonl"
        if flags.FLAGS.draw:
            lines = compare.read(file, head(small, plan))
        else:
            lines = compare_precisions(small, file, plan=plan, progress=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    about = {"parameters": small.about["parameters"], "forgotten": FORGOTTEN}
    about = head(small, plan) | about
    quantize_figures.write(lines, about, RESULTS)
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
