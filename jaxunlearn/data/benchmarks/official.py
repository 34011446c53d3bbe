# SPDX-License-Identifier: Apache-2.0
"""Benchmarks read from the files that their authors publish.

    rows = data.tofu.read("forget10_perturbed", folder="~/data")   # ~/data/tofu/...

A `Benchmark` lists its tables. A `Table` lists its files, its columns and, where the
published file was available to us, the number of its rows and their checksum. Files are
in FOLDER/NAME/, where FOLDER is an argument or the environment variable
JAXUNLEARN_DATA. `builders` converts any table to array_record.
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
from jaxunlearn.data.readers import files

VARIABLE = "JAXUNLEARN_DATA"
KINDS = ("text", "int", "texts", "image")  # str, int, list of str, uint8 [H, W, C]
TIMEOUT = 20.0  # of a download, seconds without a response

Rows = list[dict[str, Any]]


class Table(NamedTuple):
    """One table of a benchmark.

    Attributes:
        files: possible paths below the benchmark's folder; the first that exists is
            read. Empty for a table that `make` generates.
        columns: column -> one of KINDS, in order.
        num_rows: number of rows of the published table; None if unknown.
        parse: path -> rows; None for `files.read_rows`.
        make: () -> rows, for tables that this package generates.
        url: where `download` fetches the first of `files` from.
    """

    files: tuple[str, ...]
    columns: Mapping[str, str]
    num_rows: int | None = None
    parse: Callable[[Path], Rows] | None = None
    make: Callable[[], Rows] | None = None
    url: str = ""


class Benchmark(NamedTuple):
    """The tables of a benchmark, its home page, licence and citation.

    The function `read` of most benchmarks' modules is this class's method.
    """

    name: str
    tables: Mapping[str, Table]
    home: str
    licence: str
    citation: str

    def read(
        self,
        table: str,
        folder: str | os.PathLike | None = None,
        *,
        check: bool = True,
        download: bool = False,
    ) -> Rows:
        """Every row of a table in the order of its file, with its official columns.

        Args:
            table: name of the table, a key of `tables`.
            folder: the folder that contains FOLDER/NAME/; None takes JAXUNLEARN_DATA.
            check: compares the number of rows and, where known, their checksum with the
                published table. Set it to False for a part or a modified version.
            download: fetches a missing file, if the table has a `url`.
        Raises:
            ValueError: for an unknown table, wrong columns or types, an empty file,
                text that is not UTF-8, or rows that differ from the published ones.
            FileNotFoundError: naming the missing file, the folder that was searched and
                where to get it.
        Warns:
            UserWarning: naming columns that the published table does not have, which
                are dropped.
        """
        _checks.one_of(f"{self.name}.read", tuple(self.tables), table=table)
        about = self.tables[table]
        if about.make is not None:
            path, rows = f"{self.name} {table}", about.make()
        else:
            path = find(self, table, folder, download=download)
            rows = (about.parse or files.read_rows)(path)
        for index, row in enumerate(rows):
            _check_row(path, index, row, about.columns)
        seen = dict.fromkeys(name for row in rows for name in row)
        extra = [name for name in seen if name not in about.columns]
        if extra:
            warnings.warn(
                f"{path} has columns that {self.name} {table} does not: "
                f"{_checks.listed(extra)}. They were dropped.",
                stacklevel=2,
            )
        rows = [{name: row[name] for name in about.columns} for row in rows]
        if check:
            _check_published(self, table, path, rows)
        return rows


def find(
    benchmark: Benchmark,
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    download: bool = False,
) -> Path:
    """The path of a table's file; arguments and errors: `Benchmark.read`."""
    about = benchmark.tables[table]
    folder = folder or os.environ.get(VARIABLE)
    get = f"Get it from {benchmark.home}"
    if not folder:
        raise FileNotFoundError(
            f"{benchmark.name} {table} needs the folder that contains "
            f"{benchmark.name}/{about.files[0]}, but folder=None and {VARIABLE} is not "
            f"set. {get} (licence: {benchmark.licence}) and pass the folder."
        )
    home = Path(folder).expanduser() / benchmark.name
    for name in about.files:
        for path in (home / name, home / f"{name}.gz"):
            if path.exists():
                return path
    if download and about.url:
        return _fetch(about.url, home / about.files[0], get)
    names = " or ".join(about.files)
    came = "contains none of them" if home.is_dir() else "does not exist"
    fetch = f", or pass download=True to fetch {about.url}" if about.url else ""
    raise FileNotFoundError(
        f"{benchmark.name} {table} needs {names} (or .gz), but {home} {came}. {get} "
        f"(licence: {benchmark.licence}){fetch}."
    )


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows as compact JSON lines, equal for every file format."""
    total = hashlib.sha256()
    for row in rows:
        line = json.dumps(dict(row), ensure_ascii=False, separators=(",", ":"))
        total.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def checksum(benchmark: str, table: str) -> str | None:
    """The published table's `digest`; None if its file was not available to us."""
    return _checksums().get(benchmark, {}).get(table)


@cache
def _checksums() -> dict[str, dict[str, str]]:
    packaged = resources.files("jaxunlearn.data.benchmarks") / "checksums.json"
    return json.loads(packaged.read_text(encoding="utf-8"))


def _check_row(path, index, row, columns) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(
            f"{path}, row {index}: needs the columns {_checks.listed(columns)}, but "
            f"{_checks.listed(missing)} are missing: the row has "
            f"{_checks.listed(row)}. Rename columns, or use the official file."
        )
    for name, kind in columns.items():
        if not _has_type(row[name], kind):
            raise ValueError(
                f"{path}, row {index}: needs {_TYPES[kind]} in {name!r}, got "
                f"{str(row[name])[:60]!r} of type {type(row[name]).__name__}."
            )


_TYPES = {
    "text": "a text",
    "int": "a whole number",
    "texts": "a list of texts",
    "image": "an image [H, W, C] of uint8",
}


def _has_type(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "image":
        return getattr(value, "ndim", 0) == 3 and str(value.dtype) == "uint8"
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _check_published(benchmark: Benchmark, table: str, path: Any, rows: Rows) -> None:
    fix = "Use the official file, or pass check=False if the change is intended."
    num_rows = benchmark.tables[table].num_rows
    if num_rows is not None and len(rows) != num_rows:
        raise ValueError(
            f"{benchmark.name} {table} needs {num_rows} rows, got {len(rows)} from "
            f"{path}. {fix}"
        )
    wanted = checksum(benchmark.name, table)
    if wanted and digest(rows) != wanted:
        raise ValueError(
            f"{benchmark.name} {table} needs rows of checksum {wanted[:16]}..., got "
            f"{digest(rows)[:16]}... from {path}: a value or the order of the rows "
            f"differs. {fix}"
        )


def _fetch(url: str, path: Path, get: str) -> Path:
    """Downloads a file; `path` appears only when the download is complete."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except OSError as error:  # no network, unknown address, or a timeout
        raise FileNotFoundError(
            f"{path} is missing and could not be fetched from {url}: {error}. {get} "
            "manually and put it there."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".part{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
    return path
