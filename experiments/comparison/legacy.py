# SPDX-License-Identifier: Apache-2.0
"""Helpers of experiments that do not use experiments.shared yet; removed after them."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.small import world
from jaxunlearn.io import checkpoint, log

ASKED = {"forget": 48, "retain": 40}
Line = Mapping[str, Any]


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


def add(file: Path, line: Line) -> None:
    """One line more in the file."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(log.plain(line)) + "\n")
