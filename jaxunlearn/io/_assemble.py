# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a checkpoint to the leaves of the decoder, and back.

Both directions walk the tables in `_names`. Leaves are filled one after another and
tensors are read one at a time, so the host never holds much more than the params.
"""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn import trees
from jaxunlearn.io import _names, _safetensors
from jaxunlearn.models import _config, decoder
from jaxunlearn.typing import Array, Params

Put = Callable[[str, np.ndarray], Array]


class Source(NamedTuple):
    """A checkpoint on disk: settings, where each tensor lies, how to read one."""

    config: _config.DecoderConfig
    kind: str
    where: Path
    tensors: dict[str, Any]
    read: Callable[[Any], np.ndarray]
    tokenizer: Any


def assemble(source: Source, dtype: np.dtype, put: Put) -> Params:
    """Fills the leaves one after another, the largest first to keep the peak low.

    Args:
        source: the checkpoint.
        dtype: of every leaf.
        put: (path, NumPy array) -> jax.Array, called once a leaf.
    Returns:
        The params tree of the source's config.
    Raises:
        ValueError: tensors missing, left over or misshaped, all reported together.
    """
    wanted = _names.tensors(source.config, source.kind)
    _check(source, wanted)
    leaves: dict[str, list[tuple[str, _names.Tensor, _names.Part]]] = {}
    for name, tensor in wanted.items():
        for part in tensor.parts:
            leaves.setdefault(part.path, []).append((name, tensor, part))
    shapes = trees.paths(decoder.shapes(source.config))
    filled: dict[str, Array] = {}
    for path in sorted(shapes, key=lambda path: -shapes[path].size):
        buffer = _aligned(shapes[path].shape, dtype)
        for name, tensor, part in leaves[path]:
            values = source.read(source.tensors[name])
            target = buffer if part.layer is None else buffer[part.layer]
            target, values = _names.paired(tensor, part, target, values)
            target[...] = values
            del values, target
        filled[path] = jax.block_until_ready(put(path, buffer))
        del buffer
        gc.collect(0)  # JAX lets go of the NumPy array only in a collection's callback
    return trees.map_with_path(
        lambda path, _: filled[path], decoder.shapes(source.config)
    )


def specs(params: Params, config: _config.DecoderConfig) -> list[_safetensors.Spec]:
    """What to write, after checking that the params are those of the config.

    Raises:
        ValueError: leaves missing, left over or misshaped, all reported together.
    """
    needed = {
        path: leaf.shape for path, leaf in trees.paths(decoder.shapes(config)).items()
    }
    leaves = trees.paths(params)
    _names.check(
        "hf.save",
        "the params",
        needed,
        {path: tuple(leaf.shape) for path, leaf in leaves.items()},
        "Pass the whole tree (trees.merge) and the model it belongs to.",
    )

    def values(tensor: _names.Tensor) -> np.ndarray:
        joined = np.empty(tensor.shape, leaves[tensor.parts[0].path].dtype)
        for part in tensor.parts:
            leaf = leaves[part.path]
            leaf = np.asarray(leaf if part.layer is None else leaf[part.layer])
            leaf, target = _names.paired(tensor, part, leaf, joined)
            target[...] = leaf
        return joined

    return [
        _safetensors.Spec(name, tensor.shape, lambda tensor=tensor: values(tensor))
        for name, tensor in _names.tensors(config).items()
    ]


def _check(source: Source, wanted: dict[str, _names.Tensor]) -> None:
    extra = _names.buffers(set(source.tensors) - set(wanted))
    head = _names.name_of(source.config, source.kind, "unembed/kernel")
    if source.config.tied and head in source.tensors:
        _check_tied(source, head)
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


def _check_tied(source: Source, head: str) -> None:
    embedding = _names.name_of(source.config, source.kind, "embed/embedding")
    if embedding not in source.tensors:
        return  # reported with everything else that is missing
    one, other = source.tensors[embedding], source.tensors[head]
    if one.shape != other.shape or not np.array_equal(
        source.read(one), source.read(other)
    ):
        raise ValueError(
            f"hf.load needs {head} to equal {embedding} where tie_word_embeddings is "
            f"true, got different ones in {source.where}. Set tie_word_embeddings to "
            "false in config.json if the model has its own output matrix."
        )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can read in place: one copy fewer on the way."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : raw.size - 64 + first].view(dtype).reshape(shape)
