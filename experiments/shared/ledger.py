# SPDX-License-Identifier: Apache-2.0
"""A file of finished runs, one line of JSON each, from which an experiment resumes.

    ledger = Ledger(file, ledger.head(settings, world=digest), progress=True)
    for name, rate, seed in ledger.sweep(names, rates, seeds, best):
        key = f"{name} {rate:.3g} {seed}"
        if ledger.lacks(key):
            ledger.add({"key": key, "method": name, **measure(name, rate, seed)})

Every line has a `key`. The first line of the file is the head: the settings that all
runs share.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxunlearn.io import checkpoint, log

Line = Mapping[str, Any]


class Ledger:
    """The finished runs of an experiment, in memory and in its file.

    Attributes:
        file: JSON lines; created with the first use, its folder too.
        head: what all lines share.
        lines: all lines but the head, oldest first.
    """

    def __init__(
        self, file: Path, head: Line, *, progress: bool = False, unit: str = "run"
    ):
        """Reads the lines that are there. A last line that was cut off is dropped.

        Raises:
            ValueError: if the file has another head.
        """
        self.file, self.head, self.lines = Path(file), head, _read(file, head)
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._append(head)
        self._bar = tqdm(
            disable=not progress, unit=unit, dynamic_ncols=True, file=sys.stderr
        )

    @property
    def keys(self) -> set[str]:
        return {line["key"] for line in self.lines}

    def __getitem__(self, key: str) -> Line:
        return next(line for line in self.lines if line["key"] == key)

    def lacks(self, key: str) -> bool:
        """Whether a run is missing; the progress bar shows its key."""
        self._bar.set_postfix_str(key)
        return key not in self.keys

    def add(self, line: Line) -> Line:
        """Appends a finished run to the file and to `lines`."""
        self.lines.append(line)
        self._append(line)
        self._bar.update()
        return line

    def _append(self, line: Line) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(log.plain(line)) + "\n")


def _read(file: Path, expected: Line) -> list[Line]:
    file = Path(file)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        file.write_text(complete, encoding="utf-8")
    if not complete:
        file.unlink(missing_ok=True)
        return []
    first, *lines = (json.loads(line) for line in complete.splitlines())
    if first != expected:
        different = [
            name
            for name in dict.fromkeys((*expected, *first))
            if first.get(name) != expected.get(name)
        ]
        came = {name: first.get(name) for name in different}
        needed = {name: expected.get(name) for name in different}
        raise ValueError(
            f"The ledger {file} needs {needed}, got {came}. Move the file away to "
            "start again, or run with the settings it was started with."
        )
    return lines


def head(
    settings: Any, *, leave_out: Sequence[str] = ("seeds",), **more: Any
) -> dict[str, Any]:
    """The first line of a ledger: `more` and the settings, as JSON gives them back.

    Args:
        settings: a NamedTuple or a mapping.
        leave_out: settings that may differ when the experiment resumes; more seeds may
            follow.
        more: such as `world`, the digest of a small world.
    """
    known = hasattr(settings, "_asdict")
    entries = settings._asdict() if known else dict(settings.items())
    entries = {name: x for name, x in entries.items() if name not in leave_out}
    return plain({"key": "head", **more, **entries})


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples and ranges become lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(each) for each in value]
    return log.plain(value)


def sweep(
    names: Iterable[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    best: Callable[[str], float],
) -> Iterator[tuple[str, float, int]]:
    """(name, rate, seed): every rate on the first seed, then `best(name)` on others.

    `best` is called when the runs of the first seed are in the ledger.
    """
    names = list(names)
    for seed in seeds:
        for name in names:
            for rate in rates if seed == seeds[0] else (best(name),):
                yield name, rate, seed


def lowest_rate(
    rates: Sequence[float], measured: Mapping[float, float | None], bar: float
) -> tuple[float | None, bool]:
    """(the rate to use, whether it reaches the bar).

    The lowest rate whose measure is at most `bar`; if no rate of a complete sweep
    reaches it, the rate with the smallest measure.

    Args:
        rates: in increasing order.
        measured: rate -> measure, None for a run that diverged.
        bar: the largest measure that is accepted.
    Returns:
        (None, False) while rates are still to be tried.
    """
    usable = {rate: x for rate, x in measured.items() if x is not None}
    for rate in rates:
        if rate in usable and usable[rate] <= bar:
            return rate, True
    if not rates or any(rate not in measured for rate in rates):
        return None, False
    return min(usable or rates, key=lambda rate: usable.get(rate, rate)), False


def run_for(works: Iterable[Callable[[], Any]], minutes: float = 0.0) -> None:
    """Calls each in order; none starts after so many minutes, 0 for no limit."""
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    for work in works:
        if time.monotonic() > until:
            break
        work()


def provenance(module: str) -> dict[str, Any]:
    """The command that ran, without where its files lie, and the versions used."""
    words, apart = sys.argv[1:], ("--draw", "--results", "world.output=", "output=")
    words = [word for word in words if not any(name in word for name in apart)]
    return {
        "command": f"python -m {module} {shlex.join(words)}".strip(),
        "versions": {name: metadata.version(name) for name in checkpoint.LIBRARIES},
    }
