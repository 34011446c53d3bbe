# SPDX-License-Identifier: Apache-2.0
"""Logs of a run as files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A hook for fit that appends every entry to a file, one JSON object a line.

    Lines are flushed as they are written, so a run that dies leaves all it logged.
    Numbers that JSON cannot hold (nan, inf) are written as null.

    Args:
        path: the file; missing parent folders are made.
        append: False begins the file anew, True goes on after a resumed run's lines.
    """

    def __init__(self, path: str | Path, *, append: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            self.path.write_text("")

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
