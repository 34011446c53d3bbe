# SPDX-License-Identifier: Apache-2.0
"""Converts the tensors of a checkpoint to the leaves of the decoder, and back.

Both directions use the tables in `_names`. Leaves are filled one after another and
tensors are read one at a time, so the host needs little more memory than its params:
all of them, or on a mesh the shards of its devices.
"""

import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import trees
from jaxunlearn.io import _names, _safetensors
from jaxunlearn.models import _config, decoder
from jaxunlearn.typing import Array, Params, PyTree

Rows = list[tuple[str, _names.Tensor, _names.Part]]  # the tensors that fill one leaf
_COMPARED_ROWS = 1024  # of two tensors, compared at a time


class Source(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        config: the model.
        kind: whose tensor names, as in `_names.tensors`.
        where: folder or file, for error messages.
        tensors: name -> entry, as `read` takes it.
        read: (entry, index) -> values.
        tokenizer: a transformers tokenizer, or None.
        left_out: names of the tensors of other parts of a multimodal model.
    """

    config: _config.DecoderConfig
    kind: str
    where: Path
    tensors: dict[str, Any]
    read: Callable[[Any, tuple[slice, ...]], np.ndarray]
    tokenizer: Any
    left_out: tuple[str, ...] = ()


def assemble(source: Source, dtype: np.dtype, shardings: PyTree | None) -> Params:
    """Fills the leaves one after another, the largest first to lower the memory peak.

    Args:
        source: the checkpoint.
        dtype: dtype of every leaf.
        shardings: a NamedSharding for each leaf; None for the default device.
    Returns:
        The params of the source's config.
    Raises:
        ValueError: naming all tensors that are missing, unexpected or of another shape.
    """
    wanted = _names.tensors(source.config, source.kind)
    _check(source, wanted)
    leaves: dict[str, Rows] = {}
    for name, tensor in wanted.items():
        for part in tensor.parts:
            leaves.setdefault(part.path, []).append((name, tensor, part))
    shapes = trees.paths(decoder.shapes(source.config))
    places = {} if shardings is None else trees.paths(shardings)
    filled: dict[str, Array] = {}
    for path in sorted(shapes, key=lambda path: -shapes[path].size):
        leaf = _leaf(source, leaves[path], shapes[path].shape, dtype, places.get(path))
        filled[path] = jax.block_until_ready(leaf)
        gc.collect(0)  # JAX releases the NumPy array only in a garbage collection
    return trees.map_with_path(
        lambda path, _: filled[path], decoder.shapes(source.config)
    )


def specs(
    params: Params, config: _config.DecoderConfig, kind: str = "hf"
) -> list[_safetensors.Spec]:
    """The tensors to write, after checking that the params are those of the config.

    Args:
        params: all params of the model.
        config: the model.
        kind: whose names and shapes, "hf" or "gguf".
    Raises:
        ValueError: naming all leaves that are missing, unexpected or of another shape.
    """
    needed = {
        path: leaf.shape for path, leaf in trees.paths(decoder.shapes(config)).items()
    }
    leaves = trees.paths(params)
    _names.check(
        "hf.save" if kind == "hf" else "hf.save_gguf",
        "the params",
        needed,
        {path: tuple(leaf.shape) for path, leaf in leaves.items()},
        "Pass all params (trees.merge) and the model they belong to.",
    )

    def values(tensor: _names.Tensor) -> np.ndarray:
        joined = np.empty(tensor.shape, leaves[tensor.parts[0].path].dtype)
        for part in tensor.parts:
            leaf = leaves[part.path]
            leaf = np.asarray(leaf[part.place] if part.place else leaf)
            for here, there in _names.cuts(tensor, part, _all_of(leaf.shape)):
                joined[there] = _turned(leaf[here], tensor)
        return joined

    return [
        _safetensors.Spec(name, tensor.shape, lambda tensor=tensor: values(tensor))
        for name, tensor in _names.tensors(config, kind).items()
    ]


def _leaf(source: Source, rows: Rows, shape: tuple[int, ...], dtype, place) -> Array:
    """One leaf on the default device, or the shards of it on this host's devices."""
    if place is None:
        return jnp.array(_piece(source, rows, _all_of(shape), dtype))
    if source.kind == "gguf":  # reading a part reads the complete tensor: do it once
        values = _piece(source, rows, _all_of(shape), dtype)
        return jax.make_array_from_callback(shape, place, values.__getitem__, dtype)

    @functools.cache  # replicas of a piece are read once
    def piece(*ends):
        return _piece(source, rows, tuple(slice(*pair) for pair in ends), dtype)

    def callback(index):
        ends = (cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True))
        return piece(*ends)

    return jax.make_array_from_callback(shape, place, callback, dtype)


def _piece(
    source: Source, rows: Rows, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The part of a leaf at `index`, filled from one tensor after another."""
    buffer = _aligned(tuple(cut.stop - cut.start for cut in index), dtype)
    for name, tensor, part in rows:
        stack, inner = index[: len(part.place)], index[len(part.place) :]
        pairs = list(zip(part.place, stack, strict=True))
        if not all(cut.start <= i < cut.stop for i, cut in pairs):
            continue
        target = buffer[tuple(i - cut.start for i, cut in pairs)]
        for here, there in _names.cuts(tensor, part, inner):
            values = source.read(source.tensors[name], there)
            _check_range(source, name, values, dtype)
            target[here] = _turned(values, tensor)
            del values
    return buffer


def _check_range(source: Source, name: str, values: np.ndarray, dtype: np.dtype):
    """Raises ValueError if a finite value of a tensor is infinite in float16."""
    if not values.size or dtype != np.float16 or values.dtype == np.float16:
        return
    if _overflows(max(values.max(), -values.min()), dtype):
        entry = source.tensors[name]
        everything = source.read(entry, _all_of(entry.shape))
        raise ValueError(
            f"hf.load needs values that dtype={dtype.name!r} can hold, up to "
            f"{float(jnp.finfo(dtype).max):g}, got {float(abs(everything).max()):g} in "
            f"{name!r} of {source.where}. Load with dtype='bfloat16' or 'float32'."
        )


def _overflows(largest: np.floating, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(largest) and np.isinf(largest.astype(dtype)))


def _turned(values: np.ndarray, tensor: _names.Tensor) -> np.ndarray:
    """Values of a tensor for a leaf, or of a leaf for a tensor."""
    return np.swapaxes(values, -1, -2) if tensor.transpose else values


def _all_of(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _check(source: Source, wanted: dict[str, _names.Tensor]) -> None:
    extra = _names.buffers(set(source.tensors) - set(wanted))
    head = _names.name_of(source.config, source.kind, "unembed/kernel")
    if source.config.tied and head in source.tensors:
        extra = extra | {head}
    _names.check(
        "hf.load",
        source.where,
        {name: tensor.shape for name, tensor in wanted.items()},
        {
            name: entry.shape
            for name, entry in source.tensors.items()
            if name not in extra
        },
        "Check that config.json belongs to these weights.",
    )
    if source.config.tied and head in source.tensors:
        _check_tied(source, head)


def _check_tied(source: Source, head: str) -> None:
    embedding = _names.name_of(source.config, source.kind, "embed/embedding")
    one, other = source.tensors[embedding], source.tensors[head]
    rows, *width = one.shape
    step = (
        rows if source.kind == "gguf" else _COMPARED_ROWS
    )  # _gguf reads complete tensors
    parts = [
        (slice(first, min(first + step, rows)), *_all_of(width))
        for first in range(0, rows, step)
    ]
    if one.shape != other.shape or not all(
        np.array_equal(source.read(one, part), source.read(other, part))
        for part in parts
    ):
        raise ValueError(
            f"hf.load needs {head} to equal {embedding} with tie_word_embeddings=true, "
            f"got different values in {source.where}. Set tie_word_embeddings to false "
            "in config.json if the model has a separate output matrix."
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array aligned to 64 bytes, which JAX can use without a copy."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : raw.size - 64 + first].view(dtype).reshape(shape)
