# SPDX-License-Identifier: Apache-2.0
"""Every method on one data set: images at random and a class are forgotten, each seed.

    python -m experiments.vision.run --config experiments/vision/configs/fashion.py

Finished runs are kept in `<output>/<name>.jsonl`; a stopped comparison resumes with the
same command. results/<name>.json, its plot and README.md are written after every seed;
--draw only writes them again. With --only METHODS the committed runs of other methods
stay in the results, if the config is the same.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared import command, page
from experiments.shared.ledger import Ledger, Line
from experiments.vision import attacks, figures, methods
from experiments.vision import world as worlds
from jaxunlearn import _checks

FOLDER = Path(__file__).resolve().parent
CONFIG = "experiments/vision/configs/fashion.py"
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--only": dict(default="", help="methods between commas; all if empty"),
    "--draw": dict(action="store_true", help="only draw the page and plot again"),
    "--results": dict(type=Path, default=FOLDER, help="folder for page and results"),
}


def compare(
    world: worlds.World,
    ledger: Ledger,
    *,
    chosen: Mapping[str, Any] = methods.METHODS,
    done: Callable[[dict[str, Any]], None] = lambda shared: None,
) -> list[Line]:
    """All lines of the ledger, the missing ones run now.

    Args:
        world: data and network.
        ledger: of finished runs.
        chosen: methods by name.
        done: called after every seed and setting with what methods shared.
    """
    for seed in world.config.seeds:
        shared: dict[str, Any] = {}
        original = None
        for setting in world.config.settings:
            names = {name: f"{name} {setting} {seed}" for name in ("original", *chosen)}
            missing = [name for name, key in names.items() if ledger.lacks(key)]
            if not missing:
                continue
            if original is None:
                original = worlds.train_from_scratch(world, world.train, seed=seed)
            split = worlds.split(world, setting, seed)
            case = worlds.Case(world, split, original[0], seed, shared)
            for name in missing:
                about = {"method": name, "setting": setting, "seed": seed}
                method = chosen.get(name, partial(_original, trained=original))
                ledger.add({"key": names[name], **about, **_measure(method, case)})
            done(shared)
    return ledger.lines


def _measure(method: Callable[[worlds.Case], worlds.Result], case: worlds.Case) -> Line:
    """What one method gives; a method that diverges is reported, not raised."""
    start, line, result = time.perf_counter(), {"finite": False}, None
    try:
        result = method(case)
        line |= {"seconds": result.seconds, "offline": result.offline}
        line |= dict(result.about, finite=_finite(result.params))
    except FloatingPointError as error:  # NotFinite, or a GAN that diverged
        line["why"] = str(error)
    line["wall"] = time.perf_counter() - start
    if line["finite"]:
        line |= attacks.evaluate(case.world, result.params, case.split, seed=case.seed)
    return line


def _original(case: worlds.Case, *, trained) -> worlds.Result:
    return worlds.Result(*trained)


def _finite(params) -> bool:
    return all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(params))


def open_ledger(config: Any, name: str, *, progress: bool = True) -> Ledger:
    """The ledger of a config, in its output folder."""
    head = {"key": "head", "config": json.loads(config.to_json())}
    return Ledger(Path(config.output).expanduser() / name, head, progress=progress)


def content(lines: Sequence[Line], config: Any, committed: Any = None) -> Line:
    """What results/<name>.json holds.

    Args:
        lines: finished runs.
        config: of the comparison.
        committed: an earlier content, whose other runs stay if it has the same config.
    """
    plain = json.loads(config.to_json())
    plain = {k: v for k, v in plain.items() if k not in ("output", "folder")}
    runs = {}
    if committed and committed["about"]["config"] == plain:
        runs = {line["key"]: line for line in committed["runs"]}
    runs |= {line["key"]: line for line in lines}
    about = {
        "config": plain,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].platform,
    }
    runs = list(runs.values())
    return {"about": about, "methods": figures.summarise(runs), "runs": runs}


def run(arguments: command.Arguments) -> None:
    """Runs the missing methods and writes the results."""
    config, options = arguments.config, arguments.options
    if options.draw:
        page.redraw(options.results, figures.readme, figures.PLOTS)
        return
    names = options.only.split(",") if options.only else list(methods.METHODS)
    for name in names:
        _checks.one_of("--only", list(methods.METHODS), method=name)
    world = worlds.make(config)
    ledger = open_ledger(config, f"{config.name}.jsonl")

    def done(shared):
        committed = page.results(options.results).get(config.name)
        results = content(ledger.lines, config, committed)
        page.publish(
            options.results, config.name, results, figures.readme, figures.draw
        )
        if config.pictures:
            file = options.results / "results" / f"{config.name}_pictures.png"
            figures.pictures(shared, file)

    compare(world, ledger, chosen={x: methods.METHODS[x] for x in names}, done=done)


if __name__ == "__main__":
    command.main(run, __doc__, config=CONFIG, options=OPTIONS)
