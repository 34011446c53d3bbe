# SPDX-License-Identifier: Apache-2.0
"""RTT: do forgotten facts return when other facts are retrained? (2410.08827)

    python -m experiments.rtt.run --world small
    python -m experiments.rtt.run --world smollm2

Facts are dealt into folds. Each method unlearns all of them, at the strongest rate
whose damage to what should be retained is within a bound on the first seed. Then an
attacker trains on the answers of all folds but one and is scored on the fold held out.
The models before unlearning are attacked in the same way, and so are models that never
saw the facts, as negative controls.

The paper says that facts from pretraining return and that facts finetuned in return
less. A world says where facts and models come from, how strengths are matched and how
answers are scored:

* small (experiments/rtt/small/): the small world of made-up authors;
* smollm2 (experiments/rtt/smollm2/): SmolLM2-135M with capitals, questions of MMLU, and
  birthdays that are finetuned in.

This file has the procedure and figures.py the README. A world's folder has its facts
and models (world.py), its numbers (score.py) and its part of the README (page.py).

Each run is a line of JSON in the world's output folder: stopped at any time, the same
command resumes. `--minutes` starts no run after so many minutes; `--draw` runs nothing
and draws from the runs that are there; `--set` changes a setting of the world.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from experiments.rtt import figures
from experiments.rtt.jobs import Job
from experiments.rtt.small import world as small
from experiments.rtt.smollm2 import world as smollm2
from experiments.shared import command, ledger
from experiments.small import methods, program, unlearn
from jaxunlearn.data import table
from jaxunlearn.io import hf
from jaxunlearn.typing import Model, Params

WORLDS = {"small": small, "smollm2": smollm2}


class World(Protocol):
    """What a world's module gives to this program.

    Attributes:
        config: its settings; `seeds`, `steps` and `batch_size` are used here.
        head: the first line of the ledger.
        file: of the ledger.
        methods: name -> Method.
    """

    config: Any
    head: Mapping[str, Any]
    file: Path
    methods: Mapping[str, methods.Method]

    def jobs(self) -> Iterator[Job]:
        """The attacks, the most important first."""

    def facts(self, of: str) -> "Facts":
        """A set of facts in a model that knows them, made on the first call."""

    def describe(self, of: str) -> Mapping[str, Any] | None:
        """What the ledger says of a set of facts, if anything."""

    def reference(self, job: Job) -> Params:
        """The params of a job without a method."""

    def rates(self, method: str) -> Sequence[float]:
        """The rates of a method in the order in which they are tried."""

    def pick(self, swept: Sequence[ledger.Line], of: str) -> tuple[ledger.Line, bool]:
        """(the best of the runs of a sweep, whether no further rate is needed)."""

    def measure(self, of: str, params: Params) -> Mapping[str, Any]:
        """What a model knows after unlearning."""

    def attack(
        self, job: Job, params: Params, lines: Sequence[ledger.Line]
    ) -> Mapping[str, Any]:
        """Trains on all folds but the job's, and scores that one."""


class Facts(NamedTuple):
    """A set of facts in a model that knows them: what unlearn.runner reads.

    Attributes:
        model, params: the model before unlearning.
        tables: what unlearning draws from.
    """

    model: Model
    params: Params
    tables: Mapping[str, table.Table]


class Experiment(NamedTuple):
    """A world, its ledger, and the compiled steps of its methods."""

    world: World
    book: ledger.Ledger
    runners: dict[str, unlearn.Runner]

    def folder(self, of: str, method: str, rate: float, seed: int) -> Path:
        """Where the params of an unlearned model are saved."""
        place = self.book.file.with_suffix(".unlearned")
        return place / f"{of}-{method.replace(' ', '_')}-{rate:.3g}-{seed}"

    def run(self, minutes: float = 0.0) -> None:
        """Adds all attacks that the ledger lacks; none starts after so many minutes."""
        jobs = self.world.jobs()
        ledger.run_for((partial(self.attack, job) for job in jobs), minutes)

    def attack(self, job: Job) -> None:
        """One attack, and the unlearning before it where that is missing."""
        if not self.book.lacks(job.key):
            return
        self.describe(job.of)
        more = {}
        if job.method is None:
            params = self.world.reference(job)
        else:
            params, more["rate"] = self.unlearned(job.of, job.method, job.seed)
        start = time.perf_counter(), time.process_time()
        found = self.world.attack(job, params, self.book.lines)
        line = {"key": job.key, "kind": "rtt", "of": job.of, "who": job.who}
        line |= {"seed": job.seed, "fold": job.fold, **more, **found}
        line["seconds"] = time.perf_counter() - start[0]
        line["core_seconds"] = time.process_time() - start[1]
        self.book.add(line)

    def describe(self, of: str) -> None:
        """Notes how a set of facts was chosen, once."""
        start, about = time.perf_counter(), self.world.describe(of)
        if about is not None and f"facts {of}" not in self.book.keys:
            line = {"key": f"facts {of}", "kind": "facts", "of": of, **about}
            self.book.add(line | {"seconds": time.perf_counter() - start})

    def unlearned(self, of: str, method: str, seed: int) -> tuple[Params, float]:
        """What a method leaves at its best rate, and the rate.

        Rates are tried on the first seed. Params of other rates are removed.
        """
        swept, first = [], self.world.config.seeds[0]
        for rate in self.world.rates(method):
            key = self.unlearned_key(of, method, rate, first)
            if self.book.lacks(key):
                self.unlearn(of, method, rate, first)
            swept.append(self.book[key])
            best, enough = self.world.pick(swept, of)
            if enough:
                break
        for line in swept:
            if line is not best:
                gone = self.folder(of, method, line["rate"], first)
                shutil.rmtree(gone, ignore_errors=True)
        place = self.folder(of, method, best["rate"], seed)
        key = self.unlearned_key(of, method, best["rate"], seed)
        if key not in self.book.keys or not (place / "config.json").exists():
            self.unlearn(of, method, best["rate"], seed)
        return hf.load(place)[1], best["rate"]

    def unlearn(self, of: str, method: str, rate: float, seed: int) -> None:
        """Unlearns, saves the params and notes what the model then knows."""
        start, facts = time.process_time(), self.world.facts(of)
        if method not in self.runners:
            config = self.world.config
            sizes = dict(steps=config.steps, batch_size=config.batch_size)
            self.runners[method] = unlearn.runner(
                facts, self.world.methods[method], facts.tables, **sizes
            )
        runner = unlearn.rebind(self.runners[method], facts.params, facts.tables)
        if runner.frozen.ref_params is not None:
            frozen = runner.frozen._replace(ref_params=facts.params)
            runner = runner._replace(frozen=frozen)
        params, about = unlearn.run(runner, rate=rate, seed=seed)
        hf.save(facts.model, params, self.folder(of, method, rate, seed))
        key = self.unlearned_key(of, method, rate, seed)
        if key not in self.book.keys:
            line = {"key": key, "kind": "unlearned", "of": of, "method": method}
            line |= {"rate": rate, "seed": seed} | about
            line |= self.world.measure(of, params)
            self.book.add(line | {"core_seconds": time.process_time() - start})

    @staticmethod
    def unlearned_key(of: str, method: str, rate: float, seed: int) -> str:
        return f"unlearned {of} {method} {rate:.3g} {seed}"


def open_world(
    world: World, *, progress: bool = False, file: Path | None = None
) -> Experiment:
    """The experiment of a world, with the ledger in its output folder or in `file`."""
    book = ledger.Ledger(file or world.file, world.head, progress=progress)
    return Experiment(world, book, {})


def main() -> None:
    """Runs what is missing, then writes the results and the README."""
    names = {"choices": sorted(WORLDS), "default": "small", "help": "facts and models"}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--world", **names)
    name = parser.parse_known_args()[0].world
    module = WORLDS[name]

    def body(found: command.Arguments) -> None:
        world = module.make(found)
        if found.options.draw and not world.file.exists():
            raise ValueError(
                f"--draw needs the runs in {world.file}, got no such file."
            )
        run = open_world(world, progress=not found.options.draw)
        if not found.options.draw:
            run.run(found.options.minutes)
        about = ledger.plain(found.settings._asdict()) | run.book.head
        about |= ledger.provenance("experiments.rtt.run")
        about |= {"device": jax.devices()[0].device_kind} | dict(module.about(world))
        folder = Path(found.options.results or figures.FOLDER).expanduser()
        figures.write(name, run.book.lines, about, folder)

    minutes = dict(type=float, default=0.0, help="start no run after so many, 0: all")
    options = program.OPTIONS | {"--world": names, "--minutes": minutes}
    command.main(
        body, __doc__, config=module.CONFIG, settings=module.SETTINGS, options=options
    )


if __name__ == "__main__":
    sys.exit(main())
