# SPDX-License-Identifier: Apache-2.0
"""Logs of a run as files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A hook for fit that appends every entry to a file, one JSON object in a line.

    Lines are flushed as they are written, so a run that is killed leaves all of them.
    Numbers that JSON cannot hold (nan, inf) are written as null.

    Args:
        path: the file; missing parent folders are made.
        append: False empties the file first, True keeps the lines of a resumed run.
    """

    reads_state = False

    def __init__(self, path: str | Path, *, append: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            self.path.write_text("", encoding="utf-8")

    def __call__(self, state: Any, entry: Mapping[str, Any]) -> None:
        del state
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(entry)) + "\n")


def plain(value: Any) -> Any:
    """The value with every number that JSON cannot hold (nan, inf) as None."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value


def keep_before(path: str | Path, step: int) -> None:
    """Removes the lines from `step` on, and a last line that was not finished.

    A run that resumes from a checkpoint calls it first; then the file has every step
    once. A missing file stays missing.
    """
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    earlier = [line for line in lines if json.loads(line)["step"] < step]
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(line + "\n" for line in earlier), encoding="utf-8")
    os.replace(fresh, path)
