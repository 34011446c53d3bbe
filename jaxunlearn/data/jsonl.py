# SPDX-License-Identifier: Apache-2.0
"""Reading JSON lines: one object a line, every complaint with file and line."""

import gzip
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.data import capitals as facts

_MARK = b"\xef\xbb\xbf"
_EMPTY = "{} holds no rows. Write one JSON object a line, or name another file."


def read_jsonl(
    path: str | os.PathLike, required: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every object of a JSON lines file, in order; blank lines are skipped.

    Args:
        path: a UTF-8 text file; one that ends in .gz is unpacked.
        required: fields that every row must have.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, for a row that is not JSON, is not an object
            or lacks a field; naming the file, if it is no UTF-8 text or holds no rows.
    """
    return [row for _, row in _rows(path, required)]


def open_jsonl(path: str | os.PathLike, required: Sequence[str] = ()) -> "Lines":
    """The same rows as a source, for a file that does not fit in memory.

    The file is passed over once to find where its lines begin (24 bytes of memory a
    row); a row is read and checked when it is asked for.

    Raises:
        FileNotFoundError, ValueError: as `read_jsonl`, for one row when it is read.
    """
    return Lines(path, required)


class Lines:
    """A JSON lines file, row by row, from any thread; `open_jsonl` makes it."""

    def __init__(self, path: str | os.PathLike, required: Sequence[str]):
        self.path, self._required = _file(path), tuple(required)
        if self.path.suffix == ".gz":
            raise ValueError(
                f"open_jsonl needs a plain file, as it jumps from row to row, got "
                f"{path}. Unpack it, or read it whole by read_jsonl."
            )
        self._starts, self._ends, self._lines = array("q"), array("q"), array("q")
        self._stream = open(self.path, "rb")  # closed with the last reference
        end = 0
        for line, content in enumerate(self._stream, start=1):
            start, end = end, end + len(content)
            if content.removeprefix(_MARK if line == 1 else b"").strip():
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


def read_facts(path: str | os.PathLike) -> list[facts.Fact]:
    """Facts of your own in the form of the packaged capitals.

    One object a line: `country` and `capital`, optionally `continent` (wrong choices
    come from the same one) and `aliases` (a list of other accepted spellings).

    Raises:
        FileNotFoundError, ValueError: as `read_jsonl`; also for a field of the wrong
            type or a country that comes twice, with file and line.
    """
    found: list[facts.Fact] = []
    lines: dict[str, int] = {}
    for line, row in _rows(path, ("country", "capital")):
        try:
            fact = facts.make_fact(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        if fact.subject in lines:
            raise ValueError(
                f"{path}, line {line}: {fact.subject!r} is already on line "
                f"{lines[fact.subject]}. Keep one row a country."
            )
        lines[fact.subject] = line
        found.append(fact)
    return found


def _rows(
    path: str | os.PathLike, required: Sequence[str]
) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every row."""
    path = _file(path)
    text, found = read_text(path), []
    # Not splitlines(): JSON texts may hold U+2028 and its like unescaped.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            found.append((line, _row(path, line, content, required)))
    if not found:
        raise ValueError(_EMPTY.format(path))
    return found


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without its byte order mark; .gz is unpacked.

    Raises:
        ValueError: naming the file, if it is no UTF-8 text, or no whole gzip file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} needs to be a whole gzip file, got {error}. Copy it anew."
            ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, error.start) from None


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_jsonl needs a file of JSON lines, but {path} is "
            f"{'a folder' if path.is_dir() else 'not there'}. Check the path."
        )
    return path


def _not_text(path: Path, byte: int) -> ValueError:
    return ValueError(
        f"{path} needs to be UTF-8 text, but byte {byte} is not. Save it as UTF-8."
    )


def _row(
    path: Path, line: int, content: str, required: Sequence[str]
) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line}: needs one JSON object, got {content.strip()[:60]!r} "
            f"({error.msg} at column {error.colno}). Mend or remove the line."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{path}, line {line}: needs a JSON object, got a {type(row).__name__}. "
            'Write {"field": value, ...}.'
        )
    missing = [name for name in required if name not in row]
    if missing:
        raise ValueError(
            f"{path}, line {line}: needs {_checks.listed(missing)}, but the row has "
            f"{_checks.listed(row)}. Add the field."
        )
    return row
