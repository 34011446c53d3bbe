# SPDX-License-Identifier: Apache-2.0
"""What a run prints: what it will do, and the losses before and after."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxunlearn.data import table
from jaxunlearn.typing import PyTree
from jaxunlearn.workflows.training import build, settings, streams

COLUMN = 10  # characters before the text of a line


def subtracts(config: ConfigDict) -> bool:
    """Whether the run's result is original - scale * (trained - original)."""
    return config.recipe.name == "openunlearning.task_vector"


def plan(
    config: ConfigDict, built: build.Pieces, rows: Mapping[str, streams.Stream]
) -> Iterator[str]:
    """Lines about what the run will do."""
    total = _count(built.frozen.params) + _count(built.state.params)
    trained = _count(built.state.params)
    name = config.model.path or config.model.preset or "random weights"
    part = (
        "all of them train" if trained == total else f"{_short(trained)} of them train"
    )
    yield _line("model", f"{name}, {_short(total)} parameters, {part}")
    read = built.recipe.reads()
    for stream, (data, found, _) in rows.items():
        use = "" if stream in read else ", only scored"
        source = Path(found["path"]).name if found.get("path") else found["source"]
        columns = [found[c] for c in ("prompt", "answer") if found.get(c)]
        columns = f" ({', '.join(columns)})" if columns else ""
        yield _line(
            stream,
            f"{table.num_rows(data)} rows of {source}{columns}, {found['rows']} at a "
            f"time, {found['length']} tokens{use}",
        )
    yield _line("method", f"{config.recipe.name}: {_arguments(config)}")
    yield _line("steps", f"{config.steps}, a checkpoint every {config.save_every}")
    mesh = " ".join(f"{k}={v}" for k, v in built.mesh.shape.items() if v > 1)
    kind = jax.devices()[0].device_kind
    yield _line("devices", f"{built.mesh.size} x {kind}{', ' + mesh if mesh else ''}")
    size = _short(build.bytes_per_device(built), ("GB", "MB", "kB"))
    yield _line("memory", f"{size} a device for weights, optimizer and gradients")
    yield _line("output", str(config.output))


def losses(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A table of the mean loss of an answer token, in nats, by stream."""
    names = list(next(iter(scores.values())))
    wide = max(len(name) for name in ["stream", *names])
    yield f"{'stream':{wide}}  rows  " + "  ".join(f"{'loss ' + x:>12}" for x in scores)
    for name in names:
        rows = next(iter(scores.values()))[name]["rows"]
        values = "  ".join(f"{each[name]['nll']:12.4f}" for each in scores.values())
        yield f"{name:{wide}}  {rows:4}  {values}"


def _arguments(config: ConfigDict) -> str:
    """The recipe's arguments, defaults included, and the schedule."""
    values = settings.recipe_arguments(config.recipe.name)
    values |= config.recipe.args.to_dict()
    text = ", ".join(
        f"{name}={dict(value) if isinstance(value, Mapping) else value}"
        for name, value in values.items()
    )
    plan = config.schedule
    if plan.steps:
        text += f"; warmup {plan.warmup}, cosine to {plan.end} at step {plan.steps}"
    return text


def _count(tree: PyTree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _short(number: int, units: tuple[str, str, str] = ("B", "M", "k")) -> str:
    for size, unit in zip((1e9, 1e6, 1e3), units, strict=True):
        if number >= size:
            return f"{number / size:.3g} {unit}".replace(" ", " " * (len(unit) > 1))
    return str(number)


def _line(name: str, text: str) -> str:
    return f"{name:{COLUMN}}{text}"
