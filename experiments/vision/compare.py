# SPDX-License-Identifier: Apache-2.0
"""Every method on one data set: images at random and a whole class, seed after seed.

    python -m experiments.vision.compare --config=experiments/vision/configs/fashion.py

One line of JSON a run in `<output>/<name>.jsonl`: stopped at any time, the same command
goes on with what is missing. After every seed experiments/results/vision_<name>.json,
.md and .png are written from the lines; --draw only does that.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.comparison.run import add, read
from experiments.vision import attacks, figures, methods
from experiments.vision import world as worlds
from jaxunlearn import _checks

RESULTS = Path(__file__).resolve().parent / "results"


def compare(
    world: worlds.World,
    file: Path,
    *,
    known: Mapping[str, Any] = methods.METHODS,
    progress: bool = False,
    done: Any = None,
) -> list[dict[str, Any]]:
    """All lines, those that `file` lacks run now and added to it.

    Args:
        world: data and network.
        file: JSON lines; those of another config are an error.
        known: methods by name.
        progress: whether to print each line's key and time.
        done: called with the lines after every seed and setting.
    Raises:
        ValueError: if the file is of another config.
    """
    head = {"key": "head", "config": json.loads(world.config.to_json())}
    lines = read(file, head)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        add(file, head)
    for seed in world.config.seeds:
        shared: dict[str, Any] = {}
        params = seconds = None
        for setting in world.config.settings:
            keys = {line["key"] for line in lines}
            names = {name: f"{name} {setting} {seed}" for name in ("original", *known)}
            todo = [name for name, key in names.items() if key not in keys]
            if not todo:
                continue
            if params is None:
                params, seconds = worlds.original(world, world.train, seed=seed)
            split = worlds.split(world, setting, seed)
            for name in todo:
                start = time.perf_counter()
                case = methods.Case(world, split, params, seed, shared)
                line = {"key": names[name], "method": name, "setting": setting}
                line |= {"seed": seed, "finite": False}
                try:
                    result = methods.Result(params, seconds)
                    if name != "original":
                        result = known[name](case)
                    line |= {"seconds": result.seconds, "offline": result.offline}
                    line |= dict(result.about, finite=_finite(result.params))
                except FloatingPointError as error:  # NotFinite, a GAN that diverged
                    line["why"] = str(error)
                line["wall"] = time.perf_counter() - start
                if line["finite"]:
                    line |= attacks.judge(world, result.params, split, seed=seed)
                lines.append(line)
                add(file, line)
                if progress:
                    text = f"{names[name]}: {line['wall']:.0f} s"
                    print(text, file=sys.stderr, flush=True)
            if done is not None:
                done(lines, shared)
    return lines


def _finite(params) -> bool:
    return all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(params))


def main(argv: Sequence[str]) -> None:
    """Runs what is missing and writes the results."""
    del argv
    config = flags.FLAGS.config
    place = RESULTS / config.name
    try:
        for name in flags.FLAGS.only:
            _checks.one_of("The comparison", list(methods.METHODS), method=name)
        file = Path(config.output).expanduser() / f"{config.name}.jsonl"
        if flags.FLAGS.draw:
            head = {"key": "head", "config": json.loads(config.to_json())}
            figures.write(read(file, head), config, place)
            return
        world = worlds.make(config)
        names = flags.FLAGS.only or methods.METHODS
        known = {name: methods.METHODS[name] for name in names}

        def done(lines, shared):
            figures.write(lines, config, place)
            if config.pictures:
                figures.pictures(shared, place)

        compare(world, file, known=known, progress=True, done=done)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"Wrote {place}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/vision")
    flags.DEFINE_list("only", [], "names of methods, all if empty")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
