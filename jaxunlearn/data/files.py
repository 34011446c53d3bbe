# SPDX-License-Identifier: Apache-2.0
"""Rows of a file by its ending: JSON lines, JSON, CSV, Parquet, plain lines; and of a
folder that `save_to_disk` of Hugging Face's `datasets` wrote.

    rows = files.read_rows("mine.csv", ("question", "answer"))
    table.encode(tokenizer, *files.columns(rows, "question", "answer"))

Parquet and such folders need pyarrow (`pip install 'jaxunlearn[data]'`), all else
nothing.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.data import jsonl

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # files of save_to_disk


def read_rows(
    path: str | os.PathLike, required: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every row of a file, in order, as a dict of its columns.

    Args:
        path: a file that ends in .jsonl, .json (a list of objects, or JSON lines),
            .csv (the first line names the columns, all values are texts) or .parquet;
            .gz may follow all but the last. Or a folder that `save_to_disk` wrote; of
            several splits name one, as "folder/train".
        required: columns that every row must have.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and, where it has them, the line: for another
            ending, no rows, no UTF-8 text, broken syntax or a missing column; naming
            the splits, if a folder has several.
        ImportError: for Parquet and folders without pyarrow.
    """
    path = Path(path)
    if _saved(path):
        return _checked(path, _arrow(path), required)
    name = path.name.removesuffix(".gz")
    ending = Path(name).suffix
    if ending not in ENDINGS or (ending == ".parquet" and name != path.name):
        raise ValueError(
            f"read_rows needs a file that ends in one of {_checks.listed(ENDINGS)}, "
            f"got {path}. Rename or convert it."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"read_rows needs a file, but {path} is "
            f"{'a folder' if path.is_dir() else 'not there'}. Check the path."
        )
    if ending == ".jsonl":
        return jsonl.read_jsonl(path, required)
    if ending == ".json":
        rows = _json(path, required)
    else:
        rows = _csv(path) if ending == ".csv" else _parquet(path)
    return _checked(path, rows, required)


def _checked(path: Path, rows: list[Any], required: Sequence[str]) -> list[Any]:
    if not rows:
        raise ValueError(f"{path} holds no rows. Name another file.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, row {number}: needs an object, got a {type(row).__name__}. "
                'Write {"field": value, ...}.'
            )
        _has(path, number, row, required)
    return rows


def columns(rows: Sequence[dict[str, Any]], *names: str) -> tuple[list[Any], ...]:
    """The values of these columns, a list each."""
    if rows:
        _checks.has_keys("columns", "columns", names, rows[0], "Name another column.")
    return tuple([row[name] for row in rows] for name in names)


def read_texts(path: str | os.PathLike, *, lines: bool = False) -> list[dict[str, str]]:
    """Texts without columns as rows {"text": text}.

    Args:
        path: a JSON list of texts, rows that already have `text`, or plain text
            (.txt), one row as it stands.
        lines: reads any file as plain text, one row a line; blank lines are left out.
    Raises:
        FileNotFoundError, ValueError: as read_rows.
    """
    path = Path(path)
    if _saved(path):
        return read_rows(path, ("text",))
    if not path.is_file():
        raise FileNotFoundError(f"read_texts needs a file, but {path} is not there.")
    ending = Path(path.name.removesuffix(".gz")).suffix
    if lines:
        texts = [x for x in jsonl.read_text(path).split("\n") if x.strip()]
        texts = [text.removesuffix("\r") for text in texts]
    elif ending == ".txt":
        texts = [jsonl.read_text(path)]
    elif ending == ".json":
        texts = _json(path, ())
    else:
        return read_rows(path, ("text",))
    if any(isinstance(text, dict) for text in texts):
        return read_rows(path, ("text",))
    if not any(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} holds no texts. Name another file.")
    return [{"text": text} for text in texts]


def _json(path: Path, required: Sequence[str]) -> list[Any]:
    """A JSON list, or JSON lines under this ending, as some official files are."""
    text = jsonl.read_text(path)
    if not text.lstrip().startswith("["):
        return jsonl.read_jsonl(path, required)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: needs a JSON list, got {error.msg} at "
            f"column {error.colno}. Mend the file."
        ) from None


def _csv(path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(jsonl.read_text(path), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: needs {len(reader.fieldnames)} "
                    "values, as its first line has, got more or fewer. Put values "
                    'with commas in "quotes".'
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.reader.line_num}: needs CSV, got "
            f"{error}. Mend the line."
        ) from None
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path} needs to be a Parquet file, got: {error}. Copy it anew."
        ) from None


def _saved(path: Path) -> bool:
    """Whether it is a folder of save_to_disk, of one split or of several."""
    return any((path / name).is_file() for name in (_STATE, _SPLITS))


def _arrow(folder: Path) -> list[dict[str, Any]]:
    """The rows of one split, shard after shard."""
    if (folder / _SPLITS).is_file():
        splits = json.loads(jsonl.read_text(folder / _SPLITS)).get("splits", [])
        raise ValueError(
            f"{folder} holds the splits {_checks.listed(splits)}, and one was needed. "
            f"Name it, as {folder / str((splits or ['train'])[0])}."
        )
    pyarrow, rows = _pyarrow(folder), []
    for shard in json.loads(jsonl.read_text(folder / _STATE))["_data_files"]:
        file = folder / shard["filename"]
        try:
            with pyarrow.memory_map(str(file)) as stream:
                rows += pyarrow.ipc.open_stream(stream).read_all().to_pylist()
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ValueError(
                f"{file} needs to be whole, as save_to_disk wrote it, got: {error}. "
                "Copy the folder anew."
            ) from None
    return rows


def _pyarrow(path: Path) -> Any:
    for name in ("pyarrow.ipc", "pyarrow.parquet"):
        _checks.library(f"Reading {path}", name, "data")
    return _checks.library(f"Reading {path}", "pyarrow", "data")


def _has(path, number, row, required) -> None:
    missing = [name for name in required if name not in row]
    if missing:
        raise ValueError(
            f"{path}, row {number}: needs {_checks.listed(missing)}, but the row has "
            f"{_checks.listed(row)}. Add the column or rename one."
        )
