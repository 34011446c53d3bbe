# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint: their names and shapes, and the leaves they contain.

The names are in the tables of `_name_tables`; loading and saving use the same table.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxunlearn import _checks, trees
from jaxunlearn.io._name_tables import FUSED, TABLES, Row
from jaxunlearn.models import _config, decoder

# Prefixes that are missing in the names of a model saved without its head.
_PREFIXES = ("transformer.", "model.", "gpt_neox.")

# Buffers that older exporters saved with the weights; the decoder computes them.
_BUFFERS = re.compile(
    r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias|"
    r"(.*\.)?h\.\d+\.attn\.bias|.*\.attention\.bias|"
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight"
)


# Tensors of the other parts of a multimodal model, and the prefixes of its text model
# as transformers 4 and 5 write them.
_NOT_TEXT = re.compile(
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*"
)
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.*)")


def text_part(entries: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors of the text model in a multimodal folder, under the names that a text
    model has, and the names of the others."""
    found, others = {}, []
    for name, entry in entries.items():
        inner = _TEXT.fullmatch(name)
        if _NOT_TEXT.fullmatch(name):
            others.append(name)
        elif inner and inner[1].startswith("lm_head."):
            found[inner[1]] = entry
        else:
            found[f"model.{inner[1]}" if inner else name] = entry
    return found, others


class Part(NamedTuple):
    """The part of a tensor that belongs to one leaf.

    The tensor's out axis has `groups` equal groups; the leaf has units `start` to
    `start + size` of each group, in order.

    Attributes:
        path: our leaf.
        layer: index on the leaf's first axis; None if the tensor holds all layers or
            the leaf has none.
        expert: index on the leaf's second axis; None if the tensor holds all experts or
            the leaf has none.
        groups: number of groups.
        start, size: first unit within a group, and number of units.
    """

    path: str
    layer: int | None
    groups: int
    start: int
    size: int
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """The indices on the leaf's first axes."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


class Tensor(NamedTuple):
    """One tensor in a file: its shape in the file, and the leaves it contains."""

    shape: tuple[int, ...]
    transpose: bool
    parts: tuple[Part, ...]


def tensors(config: _config.DecoderConfig, kind: str = "hf") -> dict[str, Tensor]:
    """The tensors of a checkpoint of this model, by name, in the order of our leaves.

    Args:
        config: the model.
        kind: whose names, "hf", "hf_fused" (with one tensor for all experts of a layer)
            or "gguf".
    """
    shapes = {
        path: leaf.shape for path, leaf in trees.paths(decoder.shapes(config)).items()
    }
    found = {}
    for row in _table(config, kind):
        if row.paths[0] not in shapes:
            continue
        name = _name(row, kind)
        groups = config.kv_heads if row.by_head else 1
        sizes = [shapes[path][-1] // groups for path in row.paths]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        first, stacked = shapes[row.paths[0]], name.count("{}")
        shape = (*first[stacked:-1], groups * sum(sizes))
        if row.transpose:
            shape = (*shape[:-2], shape[-1], shape[-2])
        for place in itertools.product(*(range(size) for size in first[:stacked])):
            layer, expert = (*place, None, None)[:2]
            parts = tuple(
                Part(path, layer, groups, start, size, expert)
                for path, start, size in zip(row.paths, starts, sizes, strict=True)
            )
            found[name.format(*place)] = Tensor(shape, row.transpose, parts)
    return found


def kind_of(config: _config.DecoderConfig, names: Iterable[str]) -> str:
    """The kind, "hf" or "hf_fused", of a folder with tensors of these names."""
    fused = config.experts is not None and _name(FUSED[0], "hf").format(0) in names
    return "hf_fused" if fused else "hf"


def _table(config: _config.DecoderConfig, kind: str) -> tuple[Row, ...]:
    return FUSED if kind == "hf_fused" else TABLES[config.family]


def _name(row: Row, kind: str) -> str:
    return row.gguf if kind == "gguf" else row.hf


def name_of(config: _config.DecoderConfig, kind: str, path: str) -> str:
    """The name of the tensor that contains the leaf `path`, which has no layers."""
    row = next(row for row in _table(config, kind) if path in row.paths)
    return _name(row, kind)


def renamed(
    config: _config.DecoderConfig, entries: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a folder under the names of `tensors`.

    Two other spellings are recognised: a model saved without its head, such as the
    original GPT-2, has names without their first part, and transformers 5 may call
    embed_out of GPT-NeoX lm_head.
    """
    kind = kind_of(config, entries)
    wanted = tensors(config, kind)
    head = name_of(config, kind, "unembed/kernel")
    found = {}
    for name, entry in entries.items():
        others = [prefix + name for prefix in _PREFIXES]
        others += [head] if name == "lm_head.weight" else []
        matches = [other for other in others if other in wanted]
        unchanged = name in wanted or not matches or matches[0] in entries
        found[name if unchanged else matches[0]] = entry
    return found


def cuts(
    tensor: Tensor, part: Part, index: tuple[slice, ...]
) -> Iterator[tuple[Any, tuple[slice, ...]]]:
    """Where the values of a piece of a leaf are in a tensor, one group at a time.

    Args:
        tensor, part: from `tensors`.
        index: the piece: a slice with start and stop for each axis of the leaf, without
            the axis of layers.
    Yields:
        (index into the piece, index into the tensor) of the same values. If the tensor
        is transposed, the two axes are swapped.
    """
    *inner, units = index
    group_units = tensor.shape[-2 if tensor.transpose else -1] // part.groups
    for group in range(part.groups):
        first = group * part.size
        start, stop = max(units.start, first), min(units.stop, first + part.size)
        if start < stop:
            shift = group * group_units + part.start - first
            there = (*inner, slice(start + shift, stop + shift))
            here = (..., slice(start - units.start, stop - units.start))
            if tensor.transpose:
                there = (*there[:-2], there[-1], there[-2])
            yield here, there


def check(
    owner: str,
    where: object,
    needed: Mapping[str, tuple[int, ...]],
    came: Mapping[str, tuple[int, ...]],
    fix: str,
) -> None:
    """Compares names and shapes and reports all differences together.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape.
    """
    missing = [name for name in needed if name not in came]
    unexpected = [name for name in came if name not in needed]
    misshaped = [
        f"{name} should be {tuple(needed[name])} and is {tuple(came[name])}"
        for name in needed
        if name in came and tuple(needed[name]) != tuple(came[name])
    ]
    wrong = [
        f"{len(names)} {what}: {_checks.listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if wrong:
        raise ValueError(
            f"{owner} needs exactly the {len(needed)} tensors its settings describe, "
            f"got {len(came)} in {where}: {'; '.join(wrong)}. {fix}"
        )


def buffers(names: Iterable[str]) -> set[str]:
    """The names of buffers, which may be ignored."""
    return {name for name in names if _BUFFERS.fullmatch(name)}
