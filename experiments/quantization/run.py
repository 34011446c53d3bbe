# SPDX-License-Identifier: Apache-2.0
"""Does rounding an unlearned model recover forgotten facts? (2410.16454)

    python -m experiments.quantization.run

Methods without and with a retain term, and SURE around the same losses, unlearn in the
small world; each model is then scored in full precision and rounded to 8, 4 and 3 bits.
The claim is about weights that hardly move, so a method runs at the lowest of its rates
at which it forgets on the first seed (mean probability of the forgotten answers at most
`max_probability`), then on all seeds. Where no rate does, the one that forgets most is
used, and the table marks it.

Everything runs twice: with float32 master weights, and with weights, gradients and
moments in bfloat16 alone, as the paper's code trains, where a step smaller than half
the distance to the next bfloat16 number is lost. Both compute in float32, and weights
are widened to float32 before they are rounded to few bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.quantization import figures
from experiments.shared import ledger
from experiments.small import methods, program, score, unlearn, world
from jaxunlearn import edits, recipes, trees
from jaxunlearn.typing import Params

CALIBRATION = 64  # rows to retain, 48 tokens each
LINEAR = r"blocks/.*/kernel"  # what edits.quantize rounds

OU, SURE = recipes.openunlearning, recipes.sure
# SURE's percentile with the weights of the method below it: only the mask differs.
PLAIN = dict(alpha=1.0, percentile=90.0)
ONCE = dict(unit="module", refresh="once")
RECIPES: Mapping[str, Callable[..., Any]] = {
    "GA": OU.ascent,
    "GA + NLL": OU.graddiff,
    "NPO": partial(OU.npo, alpha=0.0),
    "NPO + KL": partial(OU.npo, retain_loss="kl"),
    "SURE GA + NLL": partial(SURE.graddiff, **PLAIN),
    "SURE NPO + KL": partial(SURE.npo, **PLAIN),
    "SURE NPO + KL, modules once": partial(SURE.npo, **PLAIN, **ONCE),
}

Quantizer = Callable[[Params], Params]


class QuantizationConfig(NamedTuple):
    """Settings of the experiment.

    Attributes:
        rates: learning rates, in increasing order.
        seeds: of the order of rows.
        steps: of a run.
        batch_size: rows of each stream at a step.
        num_scored: rows to forget and to retain that are scored.
        dtypes: of the weights while they train.
        group: weights that share a scale; 64 divides 256 and 704 inputs, 128 does not.
        max_probability: a method has forgotten where the mean probability of the
            answers is at most this.
    """

    rates: Sequence[float] = (5e-5, 2e-4, 5e-4, 1e-3, 2e-3)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 30
    batch_size: int = 8
    num_scored: Mapping[str, int] = MappingProxyType({"forget": 24, "retain": 24})
    dtypes: Sequence[str] = ("float32", "bfloat16")
    group: int = 64
    max_probability: float = 0.1


def quantizers(small: world.World, group: int) -> dict[str, Quantizer]:
    """Name -> float32 params to rounded ones; "full" changes nothing."""
    rows = {x: small.table("retain")[x][:CALIBRATION] for x in ("tokens", "mask")}
    tensor = dict(group="tensor", scheme="symmetric_full")
    return {
        "full": lambda params: params,
        "int8": partial(edits.quantize, kind="int8"),
        "int4": partial(edits.quantize, kind="int4", group=group),
        "int4_tensor": partial(edits.quantize, kind="int4", **tensor),
        "fp4": partial(edits.quantize, kind="fp4"),
        "nf4": partial(edits.quantize, kind="nf4"),
        "gptq4": partial(
            edits.gptq, small.model, batches=[rows], group=group, kind="int4"
        ),
        "int3": partial(edits.quantize, kind="int3", group=group),
    }


def run(
    small: world.World,
    book: ledger.Ledger,
    config: QuantizationConfig,
    builds: Mapping[str, Callable[..., Any]] = RECIPES,
) -> None:
    """Adds all runs that the ledger lacks, with the recipes of `builds`."""
    scorer = score.scorer(small, rows=config.num_scored)
    rounding = quantizers(small, config.group)
    for name, params in (("original", small.params), ("retrained", small.retrained)):
        for dtype in config.dtypes:
            key = f"{name} {dtype}"
            if book.lacks(key):
                line = {"key": key, "method": name, "dtype": dtype}
                book.add(line | measure(scorer, rounding, cast(params, dtype)))
    for dtype in config.dtypes:
        start = small._replace(params=cast(small.params, dtype))
        streams = unlearn.tables(start)
        for name, build in builds.items():
            runner = None
            for kind, rate, seed in _runs(book, name, dtype, config):
                key = f"{kind} {name} {dtype} {rate:.3g} {seed}"
                if not book.lacks(key):
                    continue
                if runner is None:
                    method = methods.of_recipe(name, build)
                    sizes = dict(steps=config.steps, batch_size=config.batch_size)
                    runner = unlearn.runner(start, method, streams, **sizes)
                params, about = unlearn.run(runner, rate=rate, seed=seed)
                line = {"key": key, "method": name, "dtype": dtype, "rate": rate}
                line |= {"seed": seed, "rounded": kind == "rounded"} | about
                line |= moved(start.params, params, config.group)
                used = rounding if kind == "rounded" else {"full": rounding["full"]}
                book.add(line | measure(scorer, used, params))


def _runs(book, name, dtype, config) -> Iterator[tuple[str, float, int]]:
    """(kind, rate, seed): rates upwards until one forgets, then every seed."""
    for rate in config.rates:
        if rate_of(book.lines, name, dtype, config)[0] is not None:
            break
        yield "sweep", rate, config.seeds[0]
    for seed in config.seeds:
        yield "rounded", rate_of(book.lines, name, dtype, config)[0], seed


def rate_of(
    lines: Sequence[ledger.Line], name: str, dtype: str, config: QuantizationConfig
) -> tuple[float | None, bool]:
    """(the rate of a method, whether it forgets there), as ledger.lowest_rate."""
    measured = {
        x["rate"]: x["scores"]["full"]["forget_probability"] if x["finite"] else None
        for x in lines
        if (x["method"], x["dtype"]) == (name, dtype) and x.get("rounded") is False
    }
    return ledger.lowest_rate(config.rates, measured, config.max_probability)


def measure(
    scorer: score.Scorer, rounding: Mapping[str, Quantizer], params: Params
) -> dict[str, Any]:
    """By quantizer the scores, and the probability of each forgotten answer."""
    wide, scores, probabilities = cast(params, "float32"), {}, {}
    for name, quantize in rounding.items():
        found = score.per_row(scorer, quantize(wide))
        scores[name] = score.summary_of(scorer, found)
        probabilities[name] = found["forget"]["probability"].tolist()
    return {"scores": scores, "probabilities": probabilities}


def moved(before: Params, after: Params, group: int) -> dict[str, float]:
    """How far linear kernels moved, in steps of their int4 grid before.

    Returns:
        `steps`, the mean of |change| in steps; `codes`, the fraction of weights whose
        nearest code on that grid is another one: these alone change the 4-bit model.
    """
    kernels = trees.paths(trees.split(before, LINEAR)[0])
    found = [_moved(x, trees.paths(after)[path], group) for path, x in kernels.items()]
    count = sum(x.size for x in kernels.values())
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


def cast(params: Params, dtype: str) -> Params:
    """params in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


if __name__ == "__main__":
    program.main(
        run,
        figures.write,
        __doc__,
        module="experiments.quantization.run",
        settings=QuantizationConfig(),
    )
