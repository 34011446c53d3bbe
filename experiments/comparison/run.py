# SPDX-License-Identifier: Apache-2.0
"""Every method in the small world: how much it forgets and what it costs.

    python -m experiments.comparison.run

Each method runs at its published learning rate and at the rates of a sweep, the same
for all, in this order: all rates on the first seed; the best rate of the sweep on the
other seeds; BLUR and the weighted sums of the same losses at all rates on the other
seeds, so that they can be compared at equal forgetting; the published rates on the
other seeds. `figures.balance` decides which rate is best.

Finished runs are kept in `<output>/<world>.methods.jsonl`; a stopped comparison
resumes with the same command. --draw only draws the page and the plot again. With
--only METHODS nothing is published: the page needs every method.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.comparison import figures
from experiments.shared import command, ledger, page
from experiments.small import methods, score, unlearn, world
from jaxunlearn import _checks

FOLDER = Path(__file__).resolve().parent
CONFIG = "experiments/small/configs/tofu.py"
NAME = "small"
Methods = Mapping[str, methods.Method]


class Settings(NamedTuple):
    """What is run, and how large.

    Attributes:
        rates: of the sweep.
        seeds: the first one chooses the best rate.
        steps: updates of a run.
        batch_size: rows of each stream.
        scored: kind of rows -> how many are scored.
    """

    rates: Sequence[float] = (1e-4, 3e-4, 5e-4, 1e-3, 2e-3)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 20
    batch_size: int = 8
    scored: Mapping[str, int] = {"forget": 48, "retain": 40}


class Run(NamedTuple):
    """One run of a method."""

    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method} {self.rate:.3g} {self.seed}"


def compare(
    small: world.World, book: ledger.Ledger, *, chosen: Methods, settings: Settings
) -> list[ledger.Line]:
    """All lines of the ledger, the missing ones run now.

    Args:
        small: where the methods run.
        book: of finished runs.
        chosen: methods by name.
        settings: rates, seeds and sizes.
    """
    scorer = score.scorer(small, rows=settings.scored)
    for name, params in (("original", small.params), ("retrained", small.retrained)):
        if book.lacks(name):
            summary = score.summary(scorer, params)
            book.add({"key": name, "method": name} | summary)
    streams = unlearn.tables(small)
    runners: dict[str, unlearn.Runner] = {}
    for run in runs(chosen, settings, book.lines):
        if not book.lacks(run.key):
            continue
        method = chosen[run.method]
        if run.method not in runners:
            runners[run.method] = unlearn.runner(
                small,
                method,
                streams,
                steps=settings.steps,
                batch_size=settings.batch_size,
            )
        params, about = unlearn.run(runners[run.method], rate=run.rate, seed=run.seed)
        published = math.isclose(run.rate, method.rate)
        line = {"key": run.key, **run._asdict(), "published": published, **about}
        book.add(line | score.summary(scorer, params))
    return book.lines


def runs(
    chosen: Methods, settings: Settings, lines: Sequence[ledger.Line]
) -> Iterator[Run]:
    """Every run, in order. `lines` must be complete up to the run that is yielded."""
    first, *others = settings.seeds
    for name, method in chosen.items():
        for rate in dict.fromkeys((method.rate, *settings.rates)):
            yield Run(name, rate, first)
    for name in chosen:
        for seed in others:
            yield Run(name, best_rate(lines, name, settings), seed)
    for pair in methods.SUMS.items():
        for rate in settings.rates:
            for seed in others:
                yield from (Run(name, rate, seed) for name in pair if name in chosen)
    for name, method in chosen.items():
        for seed in others:
            yield Run(name, method.rate, seed)


def best_rate(
    lines: Sequence[ledger.Line], method: str, settings: Settings
) -> float | None:
    """The best rate of the sweep on the first seed; None before all were run."""
    here = {
        line["rate"]: line
        for line in lines
        if line["method"] == method and line.get("seed") == settings.seeds[0]
    }
    if any(rate not in here for rate in settings.rates):
        return None
    nll = next(line["forget_nll"] for line in lines if line["method"] == "retrained")
    return max(settings.rates, key=lambda rate: figures.balance(here[rate], nll))


def run(arguments: command.Arguments) -> None:
    """Runs what is missing, then writes the results and the page."""
    config, settings, options = arguments
    if options.draw:
        page.redraw(FOLDER, figures.readme, {NAME: figures.draw})
        return
    every = methods.methods()
    names = options.only.split(",") if options.only else list(every)
    for name in names:
        _checks.one_of("--only", list(every), method=name)
    small = world.make(config, progress=True)
    file = Path(config.output).expanduser() / f"{small.digest}.methods.jsonl"
    head = ledger.head(settings, leave_out=("rates", "seeds"), world=small.digest)
    book = ledger.Ledger(file, head, progress=True)
    chosen = {name: every[name] for name in names}
    lines = compare(small, book, chosen=chosen, settings=settings)
    if not options.only:
        about = head | {"rates": list(settings.rates), "seeds": list(settings.seeds)}
        about |= {"parameters": small.about["parameters"]}
        content = figures.content(lines, about)
        page.publish(FOLDER, NAME, content, figures.readme, figures.draw)


if __name__ == "__main__":
    options = {
        "--only": dict(default="", help="methods between commas; all if empty"),
        "--draw": dict(action="store_true", help="only draw page and plot again"),
    }
    command.main(run, __doc__, config=CONFIG, settings=Settings(), options=options)
