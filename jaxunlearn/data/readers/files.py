# SPDX-License-Identifier: Apache-2.0
"""Rows of a file, by its ending: JSON lines, JSON, CSV, Parquet or plain text.

    rows = data.read_rows("mine.csv", ("question", "answer"))
    table = data.encode(tokenizer, *data.columns(rows, "question", "answer"))

Folders written by `save_to_disk` of Hugging Face's `datasets` are read too. These and
Parquet need pyarrow (`pip install 'jaxunlearn[data]'`).
"""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.data.readers import jsonl
from jaxunlearn.data.readers._rows import Rows
from jaxunlearn.data.readers._rows import place as place
from jaxunlearn.data.readers._rows import texts as texts

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # written by save_to_disk


def read_rows(
    path: str | os.PathLike, required: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every row of a file, in order, as a dict of its columns.

    Args:
        path: a file that ends in .jsonl, .json (a list of objects, or JSON lines),
            .csv (the first line names the columns, all values are texts) or .parquet;
            all but .parquet may be followed by .gz. Or a folder that `save_to_disk`
            wrote; if it has several splits, the path of one, as "folder/train".
        required: columns that every row must have.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and, where possible, the line, for another ending,
            no rows, text that is not UTF-8, broken syntax or a missing column; naming
            the splits if a folder has several.
        ImportError: for Parquet and folders, without pyarrow.
    """
    path = Path(path)
    if _is_saved_dataset(path):
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
            f"read_rows needs a file, but {path} "
            f"{'is a folder' if path.is_dir() else 'does not exist'}. Check the path."
        )
    if ending == ".jsonl":
        return jsonl.read_jsonl(path, required)
    if ending == ".json":
        rows = _json(path, required)
    else:
        rows = _csv(path) if ending == ".csv" else _parquet(path)
    return _checked(path, rows, required)


def columns(rows: Sequence[dict[str, Any]], *names: str) -> tuple[list[str], ...]:
    """The texts of the named columns, one list per column, as `data.encode` takes them.

    For columns that are not texts write [row[name] for row in rows].

    Raises:
        KeyError: if a row lacks a column.
        ValueError: if a value is missing (null, NaN), is not a text (a number, a list),
            or has half of a surrogate pair. The message names the column and the file
            and line of rows as `read_rows` returned them, otherwise the row.
    """
    return tuple(texts(rows, name) for name in names)


def read_texts(path: str | os.PathLike, *, lines: bool = False) -> list[dict[str, str]]:
    """Texts without columns, as rows {"text": text}.

    Args:
        path: a JSON list of texts, a file of rows that have `text`, or a plain text
            file (.txt), which is one row.
        lines: reads any file as plain text with one row per line; blank lines are
            skipped.
    Raises:
        FileNotFoundError, ValueError: as read_rows.
    """
    path = Path(path)
    if _is_saved_dataset(path):
        return read_rows(path, ("text",))
    if not path.is_file():
        raise FileNotFoundError(f"read_texts needs a file, but {path} does not exist.")
    ending = Path(path.name.removesuffix(".gz")).suffix
    if lines:
        found = [x for x in jsonl.read_text(path).split("\n") if x.strip()]
        found = [text.removesuffix("\r") for text in found]
    elif ending == ".txt":
        found = [jsonl.read_text(path)]
    elif ending == ".json":
        found = _json(path, ())
    else:
        return read_rows(path, ("text",))
    if any(isinstance(text, dict) for text in found):
        return read_rows(path, ("text",))
    if not any(isinstance(text, str) and text.strip() for text in found):
        raise ValueError(f"{path} has no texts. Name another file.")
    rows = Rows(({"text": text} for text in found), path)
    texts(rows, "text")
    return rows


def _checked(path: Path, rows: list[Any], required: Sequence[str]) -> list[Any]:
    if not rows:
        raise ValueError(f"{path} has no rows. Name another file.")
    rows = rows if isinstance(rows, Rows) else Rows(rows, path)
    for index, row in enumerate(rows):
        jsonl.check_row(row, place(rows, index), required)
    return rows


def _json(path: Path, required: Sequence[str]) -> list[Any]:
    """A JSON list, or JSON lines: some official .json files hold lines."""
    text = jsonl.read_text(path)
    if not text.lstrip().startswith("["):
        return jsonl.read_jsonl(path, required)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: needs a JSON list, got {error.msg} at "
            f"column {error.colno}. Correct the file."
        ) from None
    except (ValueError, RecursionError):
        row, problem = _bad_item(text)
        raise ValueError(
            f"{path}, row {row}: needs values that Python can read, got {problem}. "
            "Correct or remove the row."
        ) from None


def _bad_item(text: str) -> tuple[int, str]:
    """(index, what is wrong) of the first item of a JSON list that cannot be read."""
    decoder, row, at = json.JSONDecoder(), 0, text.index("[") + 1
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(", \n\r\t"))
        try:
            _, at = decoder.raw_decode(text, at)
        except RecursionError:
            return row, "values that are nested too deeply"
        except ValueError as error:
            return row, str(error)
        row += 1


def _csv(path: Path) -> Rows:
    text = io.StringIO(jsonl.read_text(path), newline="")
    limit = csv.field_size_limit(sys.maxsize)  # a field may hold a book
    try:
        reader = csv.DictReader(text, strict=True)
        rows, lines = [], []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: needs {len(reader.fieldnames)} "
                    "values, as its first line has, got more or fewer. Put values "
                    'that contain commas in "quotes".'
                )
            rows.append(row)
            lines.append(reader.line_num)  # where the row ends
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.reader.line_num}: needs CSV, got "
            f"{error}. Correct the line."
        ) from None
    finally:
        csv.field_size_limit(limit)
    return Rows(rows, path, lines)


def _parquet(path: Path) -> list[dict[str, Any]]:
    pyarrow = _pyarrow(path)
    broken = (pyarrow.ArrowException, OSError, ValueError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except broken as error:
        raise ValueError(
            f"{path} needs to be a Parquet file, got: {_line(error)}. Copy it again."
        ) from None
    try:
        return file.read().to_pylist()
    except broken as error:
        bad = [name for name in names if not _reads(file, name, broken)]
        raise ValueError(
            f"{path} needs to be a complete Parquet file, got {_line(error)} in the "
            f"columns {_checks.listed(bad)}. Copy it again."
        ) from None


def _reads(file: Any, column: str, broken: tuple[type[Exception], ...]) -> bool:
    try:
        file.read(columns=[column]).to_pylist()
    except broken:
        return False
    return True


def _line(error: Exception) -> str:
    """The message of another library's error on one line."""
    return " ".join(str(error).split()).removesuffix(".")


def _is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that save_to_disk wrote, of one or several splits."""
    return any((path / name).is_file() for name in (_STATE, _SPLITS))


def _arrow(folder: Path) -> list[dict[str, Any]]:
    """The rows of one split, shard after shard."""
    if (folder / _SPLITS).is_file():
        splits = json.loads(jsonl.read_text(folder / _SPLITS)).get("splits", [])
        raise ValueError(
            f"{folder} has the splits {_checks.listed(splits)}, but one is needed. "
            f"Name it, as {folder / str((splits or ['train'])[0])}."
        )
    pyarrow, rows = _pyarrow(folder), []
    for shard in json.loads(jsonl.read_text(folder / _STATE))["_data_files"]:
        file = folder / shard["filename"]
        try:
            with pyarrow.memory_map(str(file)) as stream:
                rows += pyarrow.ipc.open_stream(stream).read_all().to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{file} needs to be complete, as save_to_disk wrote it, got: "
                f"{_line(error)}. Copy the folder again."
            ) from None
    return rows


def _pyarrow(path: Path) -> Any:
    owner = f"Reading {path}"
    for name in ("pyarrow.ipc", "pyarrow.parquet"):
        _checks.library(owner, name, "data")
    return _checks.library(owner, "pyarrow", "data")
