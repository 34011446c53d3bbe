# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders, read and written one tensor at a time.

A file is eight bytes with the length of the header, the header in JSON, then the
tensors without gaps. This reader needs no library. It does not map complete files,
because every page of the checkpoint would count as memory of the process, and it
supports bfloat16 with `ml_dtypes`.

Reference: https://huggingface.co/docs/safetensors
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxunlearn import _checks

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_OWNER = "hf.load"
_MAX_HEADER = 100_000_000  # bytes, the limit of the format
_MAPPED_BYTES = 2**26  # mapped at a time when columns are sliced
_AGAIN = "Copy or download it again."
_NOT_PARSED = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError),
    RecursionError,  # of deeply nested JSON
)


class Entry(NamedTuple):
    """The location of a tensor: bytes `start` to `start + size` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Spec(NamedTuple):
    """A tensor to write; `make` returns its values when they are written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def entries(folder: Path) -> tuple[dict[str, Entry], dict[Entry, str]]:
    """Every tensor of a folder by name, from the headers only.

    Returns:
        (tensors, unlisted): tensors by name, and the names of those that are in a shard
        although the index does not list them; none without an index.
    Raises:
        FileNotFoundError: if there are no safetensors, or a shard of the index is
            missing.
        ValueError: if a file is truncated or corrupt, a shard lacks a tensor that the
            index lists there, or two shards have different values of a tensor.
    """
    shards, places = _shards(folder)
    headers = {shard.name: header(shard) for shard in shards}
    found: dict[str, Entry] = {}
    for shard in headers.values():
        for name, entry in shard.items():
            other = found.setdefault(name, entry)
            if other is not entry and not _same_bytes(other, entry):
                raise ValueError(
                    f"{_OWNER} needs every tensor once, got {name!r} with different "
                    f"values in {other.file.name} and {entry.file.name} of {folder}. "
                    f"{_AGAIN}"
                )
    for name, file in places.items():
        if name not in headers[file]:
            raise ValueError(
                f"{_OWNER} needs the tensors that {INDEX} lists, got {folder / file} "
                f"without {name!r}. {_AGAIN}"
            )
    unlisted = found.keys() - places.keys() if places else set()
    return found, {found[name]: name for name in unlisted}


def header(file: Path) -> dict[str, Entry]:
    """The tensors of one file by name, after checking that the file has their bytes."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise _corrupt(file, f"a header length of {length} bytes")
        if 8 + length > size:
            raise _truncated(file, 8 + length, size)
        text = stream.read(length)
    try:
        found = json.loads(text)
        found.pop("__metadata__", None)
        found = {
            str(name): Entry(
                file,
                str(item["dtype"]),
                tuple(int(axis) for axis in item["shape"]),
                8 + length + int(item["data_offsets"][0]),
                int(item["data_offsets"][1]) - int(item["data_offsets"][0]),
            )
            for name, item in found.items()
        }
    except _NOT_PARSED as error:
        raise _corrupt(file, f"a header that does not parse ({error})") from error
    end = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: item[1].start):
        dtype = DTYPES.get(entry.dtype)
        if dtype and entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise _corrupt(
                file,
                f"{entry.size} bytes for {name!r} of shape {entry.shape} {entry.dtype}",
            )
        if entry.start != end or entry.size < 0:
            raise _corrupt(file, f"{name!r} at byte {entry.start} instead of {end}")
        end += entry.size
    if end > size:
        raise _truncated(file, end, size)
    return found


def check_dtypes(wanted: Mapping[str, Entry]) -> None:
    """Raises ValueError naming tensors of an unsupported dtype."""
    unsupported = {entry.dtype for entry in wanted.values()} - set(DTYPES)
    if unsupported:
        names = [name for name, entry in wanted.items() if entry.dtype in unsupported]
        raise ValueError(
            f"{_OWNER} needs tensors in {_checks.listed(DTYPES)}, got "
            f"{_checks.listed(sorted(unsupported))} in {_checks.listed(names, 3)}. "
            "Quantized checkpoints must be dequantized first; load the original "
            "release instead."
        )


def read(entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
    """A block of one tensor, in the dtype of the file.

    Args:
        entry: the tensor.
        index: a slice with start and stop for each axis.
    Returns:
        The block as a new array. If columns are sliced, the file is mapped a few rows
        at a time, so that only pages with entries of the block are read.
    """
    dtype, (rows, *columns) = DTYPES[entry.dtype], index
    row = math.prod(entry.shape[1:])

    def location(start, stop):
        """(offset in the file, shape) of these rows."""
        offset = entry.start + start * row * dtype.itemsize
        return offset, (stop - start, *entry.shape[1:])

    sizes = entry.shape[1:]
    if all(x == slice(0, size) for x, size in zip(columns, sizes, strict=True)):
        offset, shape = location(rows.start, rows.stop)
        values = np.fromfile(entry.file, dtype, math.prod(shape), offset=offset)
        return values.reshape(shape)
    values = np.empty([x.stop - x.start for x in index], dtype)
    step = max(1, _MAPPED_BYTES // (row * dtype.itemsize))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        mapped = np.memmap(entry.file, dtype, "r", *location(start, stop))
        values[start - rows.start : stop - rows.start] = mapped[:, *columns]
        del mapped
    return values


def write(
    folder: Path, specs: list[Spec], dtype: str, max_shard_bytes: int
) -> list[str]:
    """Writes shards, and an index if there are several; returns the names of the files.

    Args:
        folder: an existing folder, whose files may be overwritten.
        specs: the tensors in the order of writing.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_bytes: largest size of a shard; one tensor alone may exceed it.
    Raises:
        ValueError: if a finite value is too large for `dtype`.
    """
    code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    shards = list(_fill(specs, DTYPES[code].itemsize, max_shard_bytes))
    names = [SINGLE]
    if len(shards) > 1:
        last = len(shards)
        names = [f"model-{i:05}-of-{last:05}.safetensors" for i in range(1, last + 1)]
    for file, shard in zip(names, shards, strict=True):
        with open(folder / file, "wb") as stream:
            _write_shard(stream, shard, code)
    if len(shards) > 1:
        total = sum(math.prod(spec.shape) for spec in specs) * DTYPES[code].itemsize
        places = {
            spec.name: file
            for file, shard in zip(names, shards, strict=True)
            for spec in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
        names.append(INDEX)
    return names


def _fill(specs: list[Spec], itemsize: int, max_bytes: int) -> Iterator[list[Spec]]:
    shard, used = [], 0
    for spec in specs:
        size = math.prod(spec.shape) * itemsize
        if shard and used + size > max_bytes:
            yield shard
            shard, used = [], 0
        shard.append(spec)
        used += size
    yield shard


def _write_shard(stream: BinaryIO, shard: list[Spec], code: str) -> None:
    dtype, start = DTYPES[code], 0
    items: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for spec in shard:
        end = start + math.prod(spec.shape) * dtype.itemsize
        shape = list(spec.shape)
        items[spec.name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(items, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for spec in shard:
        values = np.ascontiguousarray(spec.make())
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype, copy=False)
        if dtype != np.float32 and np.any(np.isinf(narrow) & np.isfinite(values)):
            raise ValueError(
                f"hf.save needs values that dtype={dtype.name!r} can hold, got "
                f"{np.max(np.abs(values))} in {spec.name!r}. Save with "
                "dtype='bfloat16' or 'float32'."
            )
        # ml_dtypes have no buffer protocol, so the bytes are written through a view.
        stream.write(narrow.view(np.uint8).reshape(-1).data)


def _shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder, selected as transformers selects them, and the file
    of every tensor that the index lists."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        places = index(folder / INDEX)
        shards = sorted({folder / name for name in places.values()})
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{_OWNER} needs every shard that {INDEX} names, got {folder} without "
                f"{_checks.listed(absent)}. Copy or download the missing files."
            )
        return shards, places
    others = [file for file in sorted(folder.iterdir()) if usable(file.name)]
    if len(others) == 1:
        return others, {}
    if others:
        raise FileNotFoundError(
            f"{_OWNER} needs {SINGLE}, or shards and {INDEX}, got {folder} with "
            f"{_checks.listed(file.name for file in others)} and no index. "
            "Copy the index too."
        )
    pickles = [
        file.name
        for ending in ("*.bin", "*.pt", "*.pth")
        for file in sorted(folder.glob(ending))
    ]
    if pickles:
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}).save_pretrained("
            f"{str(folder) + '-safetensors'!r}, safe_serialization=True)"
        )
        raise ValueError(
            f"{_OWNER} needs safetensors weights, got {_checks.listed(pickles)} in "
            f"{folder}, which are Python pickles and can run code. Convert them in an "
            f'environment that has torch:\npython -c "{code}"'
        )
    raise FileNotFoundError(
        f"{_OWNER} needs weights ({SINGLE}, {INDEX} or one .gguf file), got {folder} "
        f"with {_checks.listed(sorted(file.name for file in folder.iterdir()))}. "
        "Give the folder that contains the weights."
    )


def index(file: Path) -> dict[str, str]:
    """The file of every tensor, from an index."""
    try:
        places = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(Path(place)) for name, place in places.items()}
    except _NOT_PARSED as error:
        raise _corrupt(file, f"an unreadable index ({error})") from error


def usable(name: str) -> bool:
    """Whether a file may hold a model's weights under the names of transformers."""
    return name.endswith(".safetensors") and not name.startswith(
        ("consolidated", "adapter_model")
    )


def _same_bytes(one: Entry, other: Entry) -> bool:
    if (one.dtype, one.shape, one.size) != (other.dtype, other.shape, other.size):
        return False
    for first in range(0, one.size, _MAPPED_BYTES):
        count = min(_MAPPED_BYTES, one.size - first)
        parts = [
            np.fromfile(entry.file, np.uint8, count, offset=entry.start + first)
            for entry in (one, other)
        ]
        if not np.array_equal(*parts):
            return False
    return True


def _corrupt(file: Path, what: str) -> ValueError:
    return ValueError(
        f"{_OWNER} needs a safetensors file, got {file} with {what}. {_AGAIN}"
    )


def _truncated(file: Path, needed: int, came: int) -> ValueError:
    return ValueError(
        f"{_OWNER} needs a complete safetensors file, got {file} truncated: its header "
        f"describes {needed} bytes and there are {came}. {_AGAIN}"
    )
