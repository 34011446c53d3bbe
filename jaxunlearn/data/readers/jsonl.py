# SPDX-License-Identifier: Apache-2.0
"""JSON lines, one object per line. Every error names the file and the line."""

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.data.readers._rows import Rows

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EMPTY = "{} has no rows. Write one JSON object per line, or name another file."


def read_jsonl(
    path: str | os.PathLike, required: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every object of a JSON lines file, in order; blank lines are skipped.

    Args:
        path: a UTF-8 text file; a file that ends in .gz is decompressed.
        required: fields that every row must have.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a row is not JSON, is not an object or
            lacks a field; naming the file, if it is not UTF-8 text or has no rows.
    """
    numbered = numbered_rows(path, required)
    return Rows((row for _, row in numbered), path, [line for line, _ in numbered])


def numbered_rows(
    path: str | os.PathLike, required: Sequence[str] = ()
) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every row; arguments and errors: `read_jsonl`."""
    path = _file(path)
    found = []
    # Not splitlines(): JSON texts may contain U+2028 and similar unescaped.
    for line, content in enumerate(read_text(path).split("\n"), start=1):
        if content.strip():
            found.append((line, _row(path, line, content, required)))
    if not found:
        raise ValueError(_EMPTY.format(path))
    return found


def open_jsonl(path: str | os.PathLike, required: Sequence[str] = ()) -> "Lines":
    """The same rows as a source, for a file that does not fit in memory.

    The file is scanned once to find where its lines begin (24 bytes of memory per row).
    A row is read and checked when it is indexed.

    Raises:
        FileNotFoundError, ValueError: as `read_jsonl`; for a bad row, when it is read.
    """
    return Lines(path, required)


class Lines:
    """A JSON lines file with rows by index, from any thread; made by `open_jsonl`."""

    def __init__(self, path: str | os.PathLike, required: Sequence[str]):
        self.path, self._required = _file(path), tuple(required)
        if self.path.suffix == ".gz":
            raise ValueError(
                f"open_jsonl needs an uncompressed file, because it seeks to rows, got "
                f"{path}. Decompress it, or read it into memory with read_jsonl."
            )
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        self._stream = open(self.path, "rb")  # closed with the last reference
        end = 0
        for line, content in enumerate(self._stream, start=1):
            start, end = end, end + len(content)
            if content.removeprefix(_BYTE_ORDER_MARK if line == 1 else b"").strip():
                self._starts.append(start)
                self._ends.append(end)
                self._lines.append(line)
        if not self._starts:
            raise ValueError(_EMPTY.format(path))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        start, end, line = self._starts[row], self._ends[row], self._lines[row]
        content = os.pread(self._stream.fileno(), end - start, start)
        try:
            text = content.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_text(self.path, start + error.start) from None
        return _row(self.path, line, text, self._required)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark; .gz is decompressed.

    Raises:
        ValueError: naming the file, if it is not UTF-8 text or not a complete gzip
            file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} needs to be a complete gzip file, got {error}. Copy it again."
            ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, error.start) from None


def check_row(row: Any, where: str, required: Sequence[str]) -> dict[str, Any]:
    """The row; ValueError unless it is a dict with all required fields.

    Args:
        row: any decoded value.
        where: file and row or line, the start of the message.
        required: field names.
    """
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: needs a JSON object, got a {type(row).__name__}. "
            'Write {"field": value, ...}.'
        )
    missing = [name for name in required if name not in row]
    if missing:
        raise ValueError(
            f"{where}: needs {_checks.listed(missing)}, but the row has "
            f"{_checks.listed(row)}. Add the column, or name another."
        )
    return row


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_jsonl needs a file of JSON lines, but {path} "
            f"{'is a folder' if path.is_dir() else 'does not exist'}. Check the path."
        )
    return path


def _not_text(path: Path, byte: int) -> ValueError:
    return ValueError(
        f"{path} needs to be UTF-8 text, but byte {byte} is not. Save it as UTF-8."
    )


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: saying what is wrong, for broken syntax, a number with too many
            digits and values that are nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise ValueError(f"a number with too many digits: {error}") from None


def _row(
    path: Path, line: int, content: str, required: Sequence[str]
) -> dict[str, Any]:
    try:
        row = parse(content)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {line}: needs one JSON object, got {content.strip()[:60]!r} "
            f"({error}). Correct or remove the line."
        ) from None
    return check_row(row, f"{path}, line {line}", required)
