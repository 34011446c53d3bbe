# SPDX-License-Identifier: Apache-2.0
"""LLM Surgery in the small world: old biographies out, new ones in (2409.13054).

    python -m experiments.surgery.run

The model knows made-up people. The biographies of some are to be removed and replaced
by fictitious ones of the same people, which contradict them; those of the others are
retained. All three sets are scored by multiple-choice questions of three options, in a
wording that no model was trained on: the option with the highest mean log-probability
of a token is the answer. No option of a question is the answer of another set. Chance
is 1/3.

The paper's three claims are measured: accuracy on the unlearn set falls, on the update
set it rises, on the retain set it stays. The paper's weighted sum of ascent, NLL and KL
is compared with the same sum without KL, with one that caps the loss of a token at ln V
nats, and with BLUR, which has the new biographies in its upper level. Each runs at
every rate on the first seed, then on all seeds at the rate where update + retain -
unlearn accuracy is largest.

The baseline never saw the old biographies: the retrained model, trained on the new ones
and on those to retain for as many steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from experiments.shared import ledger
from experiments.small import (
    biographies,
    program,
    questions,
    score,
    unlearn,
    world,
)
from experiments.surgery import figures
from jaxunlearn import recipes
from jaxunlearn.data import table
from jaxunlearn.typing import Params

OPTIONS = 3
BASELINE = "baseline"

Build = Callable[..., recipes.Recipe]


class SurgeryConfig(NamedTuple):
    """Settings of the experiment.

    Attributes:
        rates: learning rates, all of them on the first seed.
        seeds: of the order of rows.
        steps: of a run.
        batch_size: rows of each stream at a step.
        num_scored: questions of each set at most.
    """

    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 30
    batch_size: int = 8
    num_scored: int = 64


def recipes_by_name(vocab: int) -> Mapping[str, Build]:
    """Name -> recipe of (model, learning_rate=)."""
    weighted, bilevel = recipes.surgery.weighted, recipes.surgery.bilevel
    return {
        BASELINE: _baseline,
        "surgery": weighted,
        "surgery, ascent capped at ln V": partial(weighted, cap=math.log(vocab)),
        "without KL": partial(weighted, retain=0.0),
        "BLUR, update in the upper level": bilevel,
    }


def _baseline(model, *, learning_rate):
    streams = {"update": 1.0, "retain": 1.0}
    return recipes.finetune.nll(model, learning_rate=learning_rate, streams=streams)


def tables(small: world.World) -> dict[str, table.Table]:
    """The tables of the streams: forget, update and retain rows with their answers.

    Raises:
        ValueError: if the world is not of made-up biographies.
    """
    source = small.about["config"]["facts"]["source"]
    if source != "biographies":
        raise ValueError(
            "experiments.surgery needs a world of biographies, as it makes new ones, "
            f"got {source!r}. Use --config={world.CONFIG}."
        )
    new = biographies.fictitious(small.questions["forget"])
    update = questions.encode(small.tokenizer, new, length=small.about["length"])
    return {
        "forget": small.table("forget"),
        "update": update,
        "retain": small.table("retain"),
    }


def choices(small: world.World, limit: int) -> dict[str, table.Table]:
    """Set -> its questions' options one after another, the right one first."""
    old = small.questions["forget"]
    sets = {"unlearn": old, "update": biographies.fictitious(old)}
    sets["retain"] = small.questions["retain"]
    found = {}
    for name, rows in sets.items():
        rows = list(rows)[:limit]
        options = [
            answer
            for row in rows
            for answer in questions.answers(row)[1 : 1 + OPTIONS]  # no trained wording
        ]
        repeated = [row for row in rows for _ in range(OPTIONS)]
        found[name] = questions.encode(
            small.tokenizer, repeated, options, length=small.about["length"]
        )
    return found


def accuracy(
    small: world.World, params: Params, sets: Mapping[str, table.Table]
) -> dict[str, float]:
    """Set -> accuracy on its multiple-choice questions."""
    chosen = partial(score.chosen_options, small.model, params)
    return {
        name: float((chosen(options, OPTIONS) == 0).mean())
        for name, options in sets.items()
    }


def run(small: world.World, book: ledger.Ledger, config: SurgeryConfig) -> None:
    """Adds all runs that the ledger lacks.

    Raises:
        ValueError: if the world is not of made-up biographies.
    """
    streams, sets = tables(small), choices(small, config.num_scored)
    for name, params in (("original", small.params), ("retrained", small.retrained)):
        if book.lacks(name):
            found = accuracy(small, params, sets)
            book.add({"key": name, "method": name, "accuracy": found})
    retrained = small._replace(params=small.retrained)
    unlearn.sweep(
        book,
        recipes_by_name(small.model.config.vocab),
        config,
        start=lambda name: (retrained if name == BASELINE else small, streams),
        measure=lambda params: {"accuracy": accuracy(small, params, sets)},
        score=figures.balance,
    )


if __name__ == "__main__":
    program.main(
        run,
        figures.write,
        __doc__,
        module="experiments.surgery.run",
        settings=SurgeryConfig(),
    )
