# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders, read and written one tensor at a time.

A file is eight bytes with the length of a header, the header in JSON, then the tensors
end to end. We read it ourselves: a memory map of it all would keep every page of the
checkpoint counted as ours, and bfloat16 needs `ml_dtypes`, which JAX brings.

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
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_MAPPED = 2**26  # bytes mapped at a time where rows are cut
_AGAIN = "Copy or download it again."


class Entry(NamedTuple):
    """Where a tensor lies: bytes `start` to `start + size` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Spec(NamedTuple):
    """A tensor to write; `make` gives its values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder by name, from the headers alone.

    Raises:
        FileNotFoundError: no safetensors there, or a shard of the index is absent.
        ValueError: a file is truncated or corrupt, or two shards hold the same tensor.
    """
    found: dict[str, Entry] = {}
    for shard in _shards(folder):
        for name, entry in header(shard).items():
            if name in found:
                raise ValueError(
                    f"{_OWNER} needs every tensor once, got {name!r} in both "
                    f"{found[name].file.name} and {shard.name} of {folder}. {_AGAIN}"
                )
            found[name] = entry
    return found


def header(file: Path) -> dict[str, Entry]:
    """The tensors of one file by name. Checks that the bytes they claim are there."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LONGEST_HEADER:
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
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
    """Raises ValueError naming the tensors whose dtype we cannot read."""
    strange = {entry.dtype for entry in wanted.values()} - set(DTYPES)
    if strange:
        names = [name for name, entry in wanted.items() if entry.dtype in strange]
        raise ValueError(
            f"{_OWNER} needs tensors in {_checks.listed(DTYPES)}, got "
            f"{_checks.listed(sorted(strange))} in {_checks.listed(names, 3)}. "
            "Quantized checkpoints must be dequantized first; load the original "
            "release instead."
        )


def read(entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
    """A block of one tensor, in the dtype of the file, and little else of it.

    Args:
        entry: which tensor.
        index: a slice for each axis, with start and stop.
    Returns:
        The block; the memory is the caller's own. Where rows are cut, the file is
        mapped some rows at a time, so that only pages with wanted entries are touched.
    """
    dtype, (rows, *columns) = DTYPES[entry.dtype], index
    row = math.prod(entry.shape[1:])

    def place(start, stop):  # where rows lie, as both ways of reading take it
        offset = entry.start + start * row * dtype.itemsize
        return offset, (stop - start, *entry.shape[1:])

    whole = zip(columns, entry.shape[1:], strict=True)
    if all(cut == slice(0, size) for cut, size in whole):
        offset, shape = place(rows.start, rows.stop)
        values = np.fromfile(entry.file, dtype, math.prod(shape), offset=offset)
        return values.reshape(shape)
    values = np.empty([cut.stop - cut.start for cut in index], dtype)
    step = max(1, _MAPPED // (row * dtype.itemsize))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        mapped = np.memmap(entry.file, dtype, "r", *place(start, stop))
        values[start - rows.start : stop - rows.start] = mapped[:, *columns]
        del mapped
    return values


def write(
    folder: Path, specs: list[Spec], dtype: str, max_shard_bytes: int
) -> list[str]:
    """Writes shards, and an index where there are several; returns the files' names.

    Args:
        folder: an existing folder; nothing in it may be worth keeping.
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
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    return names


def _fill(specs: list[Spec], itemsize: int, most: int) -> Iterator[list[Spec]]:
    shard, used = [], 0
    for spec in specs:
        size = math.prod(spec.shape) * itemsize
        if shard and used + size > most:
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
        # ml_dtypes have no buffer protocol, so the bytes go out as a view.
        stream.write(narrow.view(np.uint8).reshape(-1).data)


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder, chosen as transformers chooses them."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text())["weight_map"]
            shards = sorted({folder / name for name in places.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(folder / INDEX, f"an unreadable index ({error})") from error
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{_OWNER} needs every shard that {INDEX} names, got {folder} without "
                f"{_checks.listed(absent)}. Copy or download the missing files."
            )
        return shards
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise FileNotFoundError(
            f"{_OWNER} needs {SINGLE}, or {INDEX} beside the shards, got {folder} with "
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
            f"{folder}, which are Python pickles and could run code. Convert them, "
            f'in an environment that has torch, with:\npython -c "{code}"'
        )
    raise FileNotFoundError(
        f"{_OWNER} needs weights ({SINGLE}, {INDEX} or one .gguf file), got {folder} "
        f"with {_checks.listed(sorted(file.name for file in folder.iterdir()))}. "
        "Point at the folder that holds the weights."
    )


def _corrupt(file: Path, what: str) -> ValueError:
    return ValueError(
        f"{_OWNER} needs a safetensors file, got {file} with {what}. {_AGAIN}"
    )


def _truncated(file: Path, needed: int, came: int) -> ValueError:
    return ValueError(
        f"{_OWNER} needs a whole safetensors file, got {file} cut short: its header "
        f"describes {needed} bytes and there are {came}. {_AGAIN}"
    )
