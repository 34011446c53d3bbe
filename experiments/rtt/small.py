# SPDX-License-Identifier: Apache-2.0
"""Does the forgotten come back when other facts are retrained? (RTT, 2410.08827)

    python -m experiments.rtt.small --config=experiments/small/configs/tofu.py

Facts of authors to forget are dealt into folds that share no author. Each method
unlearns all of them, at the rate (attack_facts.RATES) that forgets most while the loss
on rows to keep stays within BOUND nats a token on the first seed. Then an attacker
trains on the answers of all folds but one, at several rates, and is asked the fold held
out after every epoch. Two things are measured on it: *choice*, whether the answer (of
TOFU a paraphrase) is likelier, by the token, than three wrong ones in its wording; and
*verbatim*, the probability of a token of the answer itself. Attacked in the same way
are the model before unlearning, the twin that never saw these authors, and, as the
negative control, the model before unlearning on authors that nobody ever saw.

The paper says that facts from pretraining come back and that facts finetuned in come
back less. So the twin is finetuned on the facts too, unlearned and attacked.

The page judges the claim by what comes back of what was lost: what a method left needs
no attack to be known.

One line of JSON a run, in `<output>/<world>.attack.jsonl`: stopped at any time, the
same command goes on. Writes results/relearn_small.json, .md and .png; --draw only that;
--minutes stops in time.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.comparison import run as compare
from experiments.rtt import small_facts as facts
from experiments.rtt import small_figures as attack_figures
from experiments.rtt.small_facts import Asked, Plan
from experiments.small import methods, score, unlearn, world
from jaxunlearn.data import table
from jaxunlearn.typing import Params

METHODS = {
    "GradDiff": "openunlearning.graddiff",
    "NPO": "openunlearning.npo",
    "RMU": "openunlearning.rmu",
    "BLUR-NPO": "blur.npo",
    "incorrect answer": "openunlearning.incorrect",
}
LATE = ("GradDiff", "incorrect answer")  # of facts finetuned in, as in the paper
RESULTS = Path(__file__).resolve().parent / "results" / "small"


class Bench(NamedTuple):
    """All that a run needs."""

    small: world.World
    plan: Plan
    judge: score.Scorer
    facts: Asked
    add: Callable[[Mapping[str, Any]], None]
    lines: list[Mapping[str, Any]]
    until: float

    @property
    def keys(self) -> set[str]:
        return {line["key"] for line in self.lines}


def experiment(
    small: world.World,
    file: Path,
    *,
    plan: Plan | None = None,
    minutes: float = 0.0,
    progress: bool = False,
) -> list[compare.Line]:
    """All lines of the experiment, those that `file` lacks run now and added to it.

    Args:
        small: where the methods run.
        file: JSON lines; those of another world or plan are an error.
        plan: rates, seeds and sizes; Plan() if None.
        minutes: no run begins after so many; 0 for no limit.
        progress: whether to show a bar.
    Raises:
        ValueError: if the file is of another world or plan.
    """
    plan = Plan() if plan is None else plan
    lines = compare.read(file, head(small, plan))
    if not file.exists():
        compare.add(file, head(small, plan))
    bar = tqdm(disable=not progress, unit="run", dynamic_ncols=True, file=sys.stderr)

    def add(line):
        lines.append(line)
        compare.add(file, line)
        bar.set_postfix_str(line["key"])
        bar.update()

    asked = facts.deal(small, small.questions["forget"], plan)
    judge = score.scorer(small, rows=plan.asked)
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    bench = Bench(small, plan, judge, asked, add, lines, until)
    for work in _stages(bench):
        if time.monotonic() > until:
            break
        work()
    bar.close()
    return lines


def _stages(bench: Bench) -> Iterator[Callable[[], None]]:
    """The work in order of importance: a cut leaves folds of all seeds behind."""
    plan, small = bench.plan, bench.small
    first = plan.seeds[0]
    control = facts.deal(small, facts.never_seen(small, plan), plan)
    for fold in range(plan.folds):
        for who, params in (("original", small.params), ("twin", small.retrained)):
            yield lambda w=who, p=params, f=fold: _attack(bench, w, p, f, first)
        yield lambda f=fold: _attack(
            bench, "never seen", small.params, f, first, asked=control
        )
    early = Base(bench, "pretrained", small)
    for fold in range(plan.folds):
        for seed in plan.seeds:
            for name in METHODS:
                yield lambda n=name, f=fold, s=seed: early.attack(n, f, s)
    late = Base(bench, "finetuned", None)
    for fold in range(plan.folds):
        yield lambda f=fold: _attack(
            bench, "finetuned original", late.inside().params, f, first
        )
    for name in LATE:
        for fold in range(plan.folds):
            yield lambda n=name, f=fold: late.attack(n, f, first)


def _attack(bench, who, params, fold, seed, *, asked=None, **more) -> None:
    key = f"rtt {who} {seed} {fold}"
    if key in bench.keys:
        return
    start = time.perf_counter()
    asked = bench.facts if asked is None else asked
    rates = bench.plan.attack
    if seed != bench.plan.seeds[0]:
        rates = best_rates(bench.lines, who)
    found = facts.retrain(bench.small, params, asked, fold, seed, bench.plan, rates)
    line = {"key": key, "kind": "rtt", "who": who, "seed": seed, "fold": fold} | more
    bench.add(line | found | {"seconds": time.perf_counter() - start})


def best_rates(lines: Sequence[compare.Line], who: str) -> list[float]:
    """The rate of an attack that brought most back on the seed it was swept on.

    By the best epoch of each fold, verbatim; one rate in a list.
    """
    swept = [x for x in lines if x["kind"] == "rtt" and x["who"] == who]
    swept = [x for x in swept if x["seed"] == swept[0]["seed"]]
    best = np.mean([np.max(x["verbatim"], axis=1) for x in swept], axis=0)
    return [swept[0]["rates"][int(best.argmax())]]


class Base:
    """A model that knows the facts, and what methods make of it; made when needed."""

    def __init__(self, bench: Bench, name: str, small: world.World | None):
        self.bench, self.name, self.small = bench, name, small
        self.streams: dict[str, table.Table] | None = None
        self.made: dict[str, unlearn.Runner] = {}
        self.kept: dict[tuple[str, float, int], Params] = {}

    def inside(self) -> world.World:
        """The world with this base in the place of its model."""
        if self.small is None:
            small = self.bench.small
            self.small = small._replace(params=facts.finetuned(small, self.bench.plan))
        return self.small

    def runner(self, name: str) -> unlearn.Runner:
        if self.streams is None:
            self.streams = unlearn.tables(self.inside())
        if name not in self.made:
            plan = self.bench.plan
            self.made[name] = unlearn.runner(
                self.inside(),
                methods.methods()[METHODS[name]],
                self.streams,
                steps=plan.steps,
                batch_size=plan.rows,
            )
        return self.made[name]

    def unlearned(self, name: str, rate: float, seed: int) -> Params:
        """What a method leaves; run once, and what is known of it noted."""
        run = (name, rate, seed)
        if run not in self.kept:
            self.kept[run], about = unlearn.run(self.runner(name), rate=rate, seed=seed)
            key = f"unlearned {self.name} {name} {rate:.3g} {seed}"
            if key not in self.bench.keys:
                bench, params = self.bench, self.kept[run]
                about |= {
                    "retain_loss": facts.retain_loss(bench.small, params, bench.plan)
                }
                about |= score.summary(bench.judge, params)
                about |= {"facts": facts.known(bench.small, params, bench.facts)}
                line = {"key": key, "kind": "unlearned", "base": self.name}
                line |= {"method": name, "rate": rate, "seed": seed}
                bench.add(line | about)
        return self.kept[run]

    def rate(self, name: str) -> float:
        """The rate that forgets most within the bound, or hurts least."""
        bench, first = self.bench, self.bench.plan.seeds[0]
        swept = []
        for rate in bench.plan.rates[name]:
            key = f"unlearned {self.name} {name} {rate:.3g} {first}"
            if key not in bench.keys:
                self.unlearned(name, rate, first)
            swept.append(next(x for x in bench.lines if x["key"] == key))
        return pick(swept, bench.plan.bound)["rate"]

    def attack(self, name: str, fold: int, seed: int) -> None:
        who = name if self.name == "pretrained" else f"{self.name} {name}"
        if f"rtt {who} {seed} {fold}" in self.bench.keys:
            return
        rate = self.rate(name)
        params = self.unlearned(name, rate, seed)
        _attack(self.bench, who, params, fold, seed, rate=rate)


def pick(swept: Sequence[compare.Line], bound: float) -> compare.Line:
    """Of one method's runs the one that forgets most with its retain loss in bounds."""
    within = [x for x in swept if x["finite"] and x["retain_loss"] <= bound]
    if not within:
        return min(swept, key=lambda x: x["retain_loss"])
    return min(within, key=lambda x: x["forget_probability"])


def head(small: world.World, plan: Plan) -> compare.Line:
    """What the lines of a file have in common; its first line."""
    sizes = plan._asdict() | {"rates": {k: list(x) for k, x in plan.rates.items()}}
    sizes = {k: list(x) if isinstance(x, tuple) else x for k, x in sizes.items()}
    return {"key": "head", "world": small.digest, **sizes, "asked": dict(plan.asked)}


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes relearn_small.json, .md and .png."""
    del argv
    config, plan = flags.FLAGS.config, Plan()
    try:
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.attack.jsonl"
        if flags.FLAGS.draw:
            lines = compare.read(file, head(small, plan))
        else:
            minutes = flags.FLAGS.minutes
            lines = experiment(small, file, minutes=minutes, progress=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    about = head(small, plan) | {"parameters": small.about["parameters"]}
    attack_figures.write(lines, about, RESULTS)
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_bool("draw", False, "only write the figures")
    flags.DEFINE_float("minutes", 0.0, "begin no run after so many, 0 for no limit")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
