# SPDX-License-Identifier: Apache-2.0
"""Benchmarks read from the files that their authors publish.

    rows = data.tofu.read("forget10_perturbed", folder="~/data")   # ~/data/tofu/...

A `Benchmark` names its tables; a `Table` its files, its columns and, where the file was
at hand, how many rows it has and their checksum. Files stand in `folder/NAME/`, where
`folder` is given or named by the variable JAXUNLEARN_DATA. `data.builders` puts any
table into array_record through tensorflow-datasets.
"""

import hashlib
import json
import os
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn import _checks
from jaxunlearn.data import files

VARIABLE = "JAXUNLEARN_DATA"
KINDS = ("text", "int", "texts", "image")  # str, int, list of str, uint8 [H, W, C]
SECONDS = 20.0  # without an answer, a download gives up

Rows = list[dict[str, Any]]


class Table(NamedTuple):
    """One table of a benchmark.

    Attributes:
        files: where it may stand below the benchmark's folder; the first that is there
            is read. Empty for a table that `make` makes.
        columns: column -> one of KINDS, in order.
        rows: how many the published table has; None where unknown.
        parse: from a path to rows; `files.read_rows` where None.
        make: from nothing to rows, for tables of our own.
        url: where `download` fetches the first file of `files` from.
    """

    files: tuple[str, ...]
    columns: Mapping[str, str]
    rows: int | None = None
    parse: Callable[[Path], Rows] | None = None
    make: Callable[[], Rows] | None = None
    url: str = ""


class Benchmark(NamedTuple):
    """A benchmark's tables, where it lives, and how to cite it."""

    name: str
    tables: Mapping[str, Table]
    home: str
    licence: str
    citation: str


def read(
    benchmark: Benchmark,
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    check: bool = True,
    download: bool = False,
) -> Rows:
    """Every row of a table in the order of its file, with the official columns alone.

    Args:
        benchmark: whose table.
        table: its name.
        folder: the folder above the benchmark's own; None takes JAXUNLEARN_DATA.
        check: compares the number of rows and, where known, their checksum with the
            published table's. Turn it off for a part or a version of your own.
        download: fetches a file that is missing, where there is an address for it.
    Raises:
        ValueError: for another table, wrong columns or kinds, an empty file, no UTF-8
            text, or rows that are not the published ones.
        FileNotFoundError: saying which file is missing, where it was looked for and
            where to get it.
    Warns:
        UserWarning: naming columns that the table does not have; they are left out.
    """
    _checks.one_of(f"{benchmark.name}.read", tuple(benchmark.tables), table=table)
    about = benchmark.tables[table]
    if about.make is not None:
        path, rows = f"{benchmark.name} {table}", about.make()
    else:
        path = find(benchmark, table, folder, download=download)
        rows = (about.parse or files.read_rows)(path)
    rows = [_row(path, number, row, about.columns) for number, row in enumerate(rows)]
    extra = _extra(rows, about.columns)
    if extra:
        warnings.warn(
            f"{path} has columns that {benchmark.name} {table} does not: "
            f"{_checks.listed(extra)}. They are left out.",
            stacklevel=3,
        )
    rows = [{name: row[name] for name in about.columns} for row in rows]
    if check:
        _same(benchmark, table, path, rows)
    return rows


def find(
    benchmark: Benchmark,
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    download: bool = False,
) -> Path:
    """The path of a table's file; for the arguments and errors see `read`."""
    about = benchmark.tables[table]
    folder = folder or os.environ.get(VARIABLE)
    get = f"Get it from {benchmark.home}"
    if not folder:
        raise FileNotFoundError(
            f"{benchmark.name} {table} needs the folder above {benchmark.name}/"
            f"{about.files[0]}, but none is given and {VARIABLE} is not set. {get} "
            f"(licence: {benchmark.licence}) and name the folder."
        )
    place = Path(folder).expanduser() / benchmark.name
    for name in about.files:
        for path in (place / name, place / f"{name}.gz"):
            if path.exists():
                return path
    fetched = f", or give download=True to fetch {about.url}" if about.url else ""
    if download and about.url:
        return _fetch(about.url, place / about.files[0], get)
    names = " or ".join(about.files)
    raise FileNotFoundError(
        f"{benchmark.name} {table} needs {names} (or .gz), but {place} has "
        f"{'none of them' if place.is_dir() else 'not been made'}. {get} (licence: "
        f"{benchmark.licence}){fetched}."
    )


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows as compact JSON lines: the same for every form of a file."""
    total = hashlib.sha256()
    for row in rows:
        line = json.dumps(dict(row), ensure_ascii=False, separators=(",", ":"))
        total.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def known(benchmark: str, table: str) -> str | None:
    """The checksum of a table's rows, where the published file was at hand."""
    return _checksums().get(benchmark, {}).get(table)


@cache
def _checksums() -> dict[str, dict[str, str]]:
    packaged = resources.files("jaxunlearn.data") / "checksums.json"
    return json.loads(packaged.read_text(encoding="utf-8"))


def _row(path, number, row, columns) -> dict[str, Any]:
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(
            f"{path}, row {number}: needs the columns {_checks.listed(columns)}, but "
            f"{_checks.listed(missing)} are missing: there is {_checks.listed(row)}. "
            "Rename columns, or take the official file."
        )
    for name, kind in columns.items():
        value = row[name]
        if not _is(value, kind):
            raise ValueError(
                f"{path}, row {number}: needs {_WORDS[kind]} in {name!r}, got "
                f"{str(value)[:60]!r} of type {type(value).__name__}."
            )
    return row


_WORDS = {
    "text": "a text",
    "int": "a whole number",
    "texts": "a list of texts",
    "image": "an image [H, W, C] of uint8",
}


def _is(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "image":
        return getattr(value, "ndim", 0) == 3 and str(value.dtype) == "uint8"
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _extra(rows: Rows, columns: Mapping[str, str]) -> list[str]:
    seen = dict.fromkeys(name for row in rows for name in row)
    return [name for name in seen if name not in columns]


def _same(benchmark: Benchmark, table: str, path: Any, rows: Rows) -> None:
    fix = "Take the official file, or give check=False if this is meant."
    count = benchmark.tables[table].rows
    if count is not None and len(rows) != count:
        raise ValueError(
            f"{benchmark.name} {table} needs {count} rows, got {len(rows)} from "
            f"{path}. {fix}"
        )
    wanted = known(benchmark.name, table)
    if wanted and digest(rows) != wanted:
        raise ValueError(
            f"{benchmark.name} {table} needs rows of checksum {wanted[:16]}..., got "
            f"{digest(rows)[:16]}... from {path}: a value was changed, or rows stand "
            f"in another order. {fix}"
        )


def _fetch(url: str, path: Path, get: str) -> Path:
    """Downloads whole or not at all."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content = answer.read()
    except OSError as error:  # no network, no such address, no answer in time
        raise FileNotFoundError(
            f"{path} is missing and could not be fetched from {url}: {error}. {get} by "
            f"hand and put it there."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".part{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
    return path
