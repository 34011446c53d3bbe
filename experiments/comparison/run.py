# SPDX-License-Identifier: Apache-2.0
"""Every method in the small world, on three seeds: how much is forgotten, what is lost.

    python -m experiments.comparison.run --config=experiments/small/configs/tofu.py

Each method runs at its published learning rate and at RATES, the same for all, on the
first seed; then at the best of RATES on the other seeds; then BLUR and the weighted
sums of the same losses at all RATES on the other seeds, so that they can be compared at
equal forgetting; last, the published rates on the other seeds. The best rate is the one
that figures.balance says.

One line of JSON a run, in `<output>/<world>.methods.jsonl`: stopped at any time, the
same command goes on. --draw only writes the figures from those lines.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.comparison import figures
from experiments.small import methods, score, unlearn, world
from jaxunlearn import _checks
from jaxunlearn.io import checkpoint, log

RATES = (1e-4, 3e-4, 5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
STEPS, ROWS = 20, 8
ASKED = {"forget": 48, "retain": 40}
RESULTS = Path(__file__).resolve().parent / "results" / "small"

Line = Mapping[str, Any]


class Run(NamedTuple):
    """One run: what it is known by in the file of results."""

    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method} {self.rate:.3g} {self.seed}"


class Plan(NamedTuple):
    """What is run, and how large."""

    rates: Sequence[float] = RATES
    seeds: Sequence[int] = SEEDS
    steps: int = STEPS
    rows: int = ROWS
    asked: Mapping[str, int] = ASKED


def compare(
    small: world.World,
    file: Path,
    *,
    known: Mapping[str, methods.Method],
    plan: Plan,
    progress: bool = False,
) -> list[Line]:
    """All lines of the comparison, those that `file` lacks run now and added to it.

    Args:
        small: where the methods run.
        file: JSON lines; those of another world or plan are an error.
        known: methods by name.
        plan: rates, seeds and sizes.
        progress: whether to show a bar.
    Raises:
        ValueError: if the file is of another world or plan.
    """
    lines = read(file, head(small, plan))
    judge = score.scorer(small, rows=plan.asked)
    streams = unlearn.tables(small)
    if not file.exists():
        add(file, head(small, plan))
        # The reference points: nothing done, and retrained.
        for name, params in (("untouched", small.params), ("twin", small.retrained)):
            lines.append({"key": name, "method": name} | score.summary(judge, params))
            add(file, lines[-1])
    bar = tqdm(disable=not progress, unit="run", dynamic_ncols=True, file=sys.stderr)
    made: dict[str, unlearn.Runner] = {}
    for batch in (_first, _best, _pairs, _published):
        todo = [run for run in batch(known, plan, lines) if run.key not in _keys(lines)]
        bar.total = bar.n + len(todo)
        for run in todo:
            bar.set_postfix_str(run.key)
            if run.method not in made:
                sizes = dict(steps=plan.steps, batch_size=plan.rows)
                method = known[run.method]
                made[run.method] = unlearn.runner(small, method, streams, **sizes)
            params, about = unlearn.run(made[run.method], rate=run.rate, seed=run.seed)
            published = math.isclose(run.rate, known[run.method].rate)
            line = {"key": run.key, **run._asdict(), "published": published, **about}
            lines.append(line | score.summary(judge, params))
            add(file, lines[-1])
            bar.update()
    bar.close()
    return lines


def head(small: world.World, plan: Plan) -> Line:
    """What the lines of a file have in common; its first line."""
    sizes = dict(steps=plan.steps, rows=plan.rows, asked=dict(plan.asked))
    return {"key": "head", "world": small.digest, **sizes}


def sizes(small: world.World, plan: Any) -> Line:
    """A head of all that a plan with `rates` says but its seeds, as more may follow."""
    said = plan._asdict() | {"rates": list(plan.rates)}
    del said["seeds"]
    return {"key": "head", "world": small.digest, **said}


def at_rate(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """(model, rate) -> recipe(model, learning_rate=rate)."""
    return lambda model, rate: recipe(model, learning_rate=rate)


def provenance(small: world.World) -> dict[str, Any]:
    """Of a run from the command line: parameters, command and versions."""
    module = f"experiments.small.{Path(sys.argv[0]).stem}"
    return {"parameters": small.about["parameters"]} | made_by(module)


def made_by(module: str) -> dict[str, Any]:
    """Versions, and this command without what only says where its lines lie, or that
    there are lines already."""
    apart = ("--draw", "--config.output=")
    words = [word for word in sys.argv[1:] if not word.startswith(apart)]
    return {
        "command": f"python -m {module} {shlex.join(words)}",
        "versions": {name: metadata.version(name) for name in checkpoint.LIBRARIES},
    }


def drawn(file: Path) -> tuple[Line, list[Line]]:
    """(what the lines of a file have in common, the lines), whatever they are of."""
    with file.open(encoding="utf-8") as text:
        first = json.loads(text.readline())
    return first, read(file, first)


def read(file: Path, expected: Line) -> list[Line]:
    """The lines that are there; one that was not finished is dropped."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    first, *lines = (json.loads(line) for line in whole.splitlines())
    if first != expected:
        raise ValueError(
            f"{file} needs to be of {dict(expected)}, got {first}. Move it away to "
            "begin anew."
        )
    return lines


def best(lines: Sequence[Line], method: str, plan: Plan) -> float | None:
    """The rate of RATES that does best on the first seed; None before they are run."""
    own = {
        line["rate"]: line
        for line in lines
        if line["method"] == method and line.get("seed") == plan.seeds[0]
    }
    if any(rate not in own for rate in plan.rates):
        return None
    twin = next(line["forget_nll"] for line in lines if line["method"] == "twin")
    return max(plan.rates, key=lambda rate: figures.balance(own[rate], twin))


def _first(known, plan, lines) -> Iterator[Run]:
    for name, method in known.items():
        for rate in dict.fromkeys((method.rate, *plan.rates)):
            yield Run(name, rate, plan.seeds[0])


def _best(known, plan, lines) -> Iterator[Run]:
    for name in known:
        for seed in plan.seeds[1:]:
            yield Run(name, best(lines, name, plan), seed)


def _pairs(known, plan, lines) -> Iterator[Run]:
    for pair in methods.SUMS.items():
        for rate in plan.rates:
            for seed in plan.seeds[1:]:
                yield from (Run(name, rate, seed) for name in pair if name in known)


def _published(known, plan, lines) -> Iterator[Run]:
    for name, method in known.items():
        for seed in plan.seeds[1:]:
            yield Run(name, method.rate, seed)


def _keys(lines) -> set[str]:
    return {line["key"] for line in lines}


def add(file: Path, line: Line) -> None:
    """One line more in the file."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(log.plain(line)) + "\n")


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes methods_small.json, .md and .png."""
    del argv
    config, known = flags.FLAGS.config, methods.methods()
    try:
        for name in flags.FLAGS.only:
            _checks.one_of("The comparison", list(known), method=name)
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.methods.jsonl"
        plan = Plan()
        if flags.FLAGS.draw:
            lines = read(file, head(small, plan))
        else:
            only = flags.FLAGS.only or known
            known = {name: known[name] for name in only}
            lines = compare(small, file, known=known, plan=plan, progress=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    about = head(small, plan) | {"rates": list(plan.rates), "seeds": list(plan.seeds)}
    figures.write(lines, about | {"parameters": small.about["parameters"]}, RESULTS)
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_list("only", [], "names of methods, all if empty")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
