# SPDX-License-Identifier: Apache-2.0
"""Merges a LoRA adapter in the format of the library PEFT onto its base model.

A weight W of the base becomes W + s B A, with s = lora_alpha / r, or lora_alpha /
sqrt(r) with use_rslora, and r and lora_alpha of the module by rank_pattern and
alpha_pattern. Modules that were trained completely (modules_to_save, biases) replace
those of the base. The product is computed in float32 as each part of a weight is read.

Other adapters, and settings that change what is computed, are refused by name.

References: https://arxiv.org/abs/2106.09685 (LoRA), https://arxiv.org/abs/2312.03732
(rsLoRA), https://huggingface.co/docs/peft (the format).
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.io import _assemble, _hf_config, _hub, _names, _safetensors
from jaxunlearn.models import _config

_OWNER = "hf.load"
_PREFIX = "base_model.model."
_FIX = "Merge it in PEFT with merge_and_unload() and save the result."
# Settings that say which modules were trained and how, but not what they compute.
_HARMLESS = frozenset(
    "peft_type auto_mapping peft_version task_type base_model_name_or_path revision "
    "inference_mode r target_modules exclude_modules lora_alpha lora_dropout bias "
    "fan_in_fan_out use_rslora modules_to_save layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern megatron_config megatron_core runtime_config "
    "ensure_weight_tying loftq_config eva_config corda_config lora_ga_config "
    "init_lora_weights qalora_group_size target_modules_to_tie".split()
)
# Other ways to initialise an adapter also change the weights of the base.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])"
    r"(\.default)?(\.weight)?"
)
_COMPLETE = re.compile(
    r"(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?"
    r"\.(?P<leaf>weight|bias)"
)


class Merged(NamedTuple):
    """A weight of the base, of shape [out, in], or [in, out] if `flip`, plus s B A."""

    base: _safetensors.Entry
    low: _safetensors.Entry  # A, [r, in]
    high: _safetensors.Entry  # B, [out, r]
    scale: float
    flip: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


def is_adapter(names: list[str]) -> bool:
    """Whether a folder with these files is an adapter, without weights of a model."""
    model = (_safetensors.SINGLE, _safetensors.INDEX)
    return _hub.ADAPTER in names and not any(name in names for name in model)


def settings(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        ValueError: if it does not parse, or has settings that cannot be merged.
    """
    file = folder / _hub.ADAPTER
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("peft_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{_OWNER} needs JSON in {file}, got text that does not parse ({error}). "
            "Copy or download it again."
        ) from error
    others = {
        name: value
        for name, value in found.items()
        if name not in _HARMLESS and value not in (None, False, [], {})
    }
    if found.get("init_lora_weights", True) not in _INITS:
        others["init_lora_weights"] = found["init_lora_weights"]
    if kind != "LORA":
        others = {"peft_type": kind}
    if others:
        name, value = next(iter(others.items()))
        raise ValueError(
            f"{_OWNER} needs an adapter of plain LoRA, got {name}={value!r} in {file}. "
            f"{_FIX}"
        )
    return found


def merge(
    base: _assemble.Source, folder: Path, given: dict[str, Any]
) -> _assemble.Source:
    """The base model with the adapter of a folder.

    Args:
        base: the base model, of a folder.
        folder: the adapter.
        given: its `settings`.
    Raises:
        ValueError: for tensors that do not belong to the base, or of another shape.
    """
    if base.kind == "gguf":
        raise ValueError(
            f"{_OWNER} needs a base model in safetensors for the adapter {folder}, got "
            f"{base.where}. Give the folder of the original release as base."
        )
    entries = _entries(folder)
    targets = _renamed(base.config, entries)
    config, tensors = _untied(base, {target for _, target in targets}, given)
    wanted, halves = _names.tensors(config, base.kind), {}
    for (half, target), entry in targets.items():
        if half is None:
            tensors[target] = entry
        else:
            halves.setdefault(target, {})[half] = entry
    lone = [target for target, pair in halves.items() if len(pair) != 2]
    unknown = [target for _, target in targets if target not in wanted]
    if lone or unknown or not entries:
        names = sorted({*lone, *unknown})
        raise ValueError(
            f"{_OWNER} needs an adapter of {base.where}, got {folder} with tensors for "
            f"{_checks.listed(names)}. Give its base model as base."
        )
    embedding = _names.name_of(config, base.kind, "embed/embedding")
    for target, pair in halves.items():
        flip = target == embedding or not wanted[target].transpose
        tensors[target] = _merged(folder, given, target, tensors[target], pair, flip)
    rows = tensors[embedding].shape[0]  # of the adapter if it replaces the embedding
    config = dataclasses.replace(config, vocab=rows)
    return base._replace(config=config, tensors=tensors, read=read)


def read(entry: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A block of a tensor, in float32 if the adapter changes it."""
    if not isinstance(entry, Merged):
        return _safetensors.read(entry, index)
    rows, columns = index[::-1] if entry.flip else index
    rank = slice(0, entry.low.shape[0])
    low = _safetensors.read(entry.low, (rank, columns)).astype(np.float32)
    high = _safetensors.read(entry.high, (rows, rank)).astype(np.float32)
    change = entry.scale * (high @ low)
    values = _safetensors.read(entry.base, index).astype(np.float32)
    return values + (change.T if entry.flip else change)


def _entries(folder: Path) -> dict[str, _safetensors.Entry]:
    file = folder / _hub.ADAPTER_WEIGHTS
    if not file.is_file():
        names = sorted(each.name for each in folder.iterdir())
        raise FileNotFoundError(
            f"{_OWNER} needs {_hub.ADAPTER_WEIGHTS} next to {_hub.ADAPTER}, got "
            f"{folder} with {_checks.listed(names)}. Save the adapter again in PEFT "
            "with save_pretrained(..., safe_serialization=True)."
        )
    entries = _safetensors.header(file)
    _safetensors.check_dtypes(entries)
    return entries


def _renamed(
    config: _config.DecoderConfig, entries
) -> dict[tuple[str | None, str], Any]:
    """(half, tensor of the model) -> entry; half is "A", "B", or None for all of it."""
    found, names = {}, {}
    for name in entries:
        plain = name.removeprefix(_PREFIX)
        low = _LOW_RANK.fullmatch(plain)
        complete = _COMPLETE.fullmatch(plain)
        if low:
            target = f"{low['module']}.weight"
            names[name] = (low["half"], target)
        elif complete and ".lora_" not in plain:
            names[name] = (None, f"{complete['module']}.{complete['leaf']}")
        else:
            names[name] = (None, plain)  # of another method; reported as unknown
    targets = {target: target for _, target in names.values()}
    if _hf_config.is_multimodal(config.source):
        targets, _ = _names.text_part(targets)
    full = {old: new for new, old in _names.renamed(config, targets).items()}
    for name, (half, target) in names.items():
        if target in full:  # not of the other parts of a multimodal model
            found[half, full[target]] = entries[name]
    return found


def _merged(folder: Path, given, target: str, base, halves, flip: bool) -> Merged:
    module = target.removesuffix(".weight")
    rank = _by_pattern(given.get("rank_pattern"), module, given.get("r", 8))
    alpha = _by_pattern(given.get("alpha_pattern"), module, given.get("lora_alpha", 8))
    low, high = halves["A"], halves["B"]
    inputs, outputs = base.shape if flip else base.shape[::-1]
    if low.shape != (rank, inputs) or high.shape != (outputs, rank):
        raise ValueError(
            f"{_OWNER} needs halves of {module!r} of shapes {(rank, inputs)} and "
            f"{(outputs, rank)}, for rank {rank} and the base, got {low.shape} "
            f"and {high.shape} in {folder}. Give the adapter's base model as base."
        )
    scale = alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)
    return Merged(base, low, high, scale, flip)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _untied(
    base: _assemble.Source, touched: set[str], given: dict[str, Any]
) -> tuple[_config.DecoderConfig, dict[str, Any]]:
    """The config and tensors of the base, untied if the adapter changes one of two tied
    matrices: PEFT trains a copy of it then, so the two are no longer equal."""
    config, tensors = base.config, dict(base.tensors)
    paths = ("embed/embedding", "unembed/kernel")
    embedding, head = (_names.name_of(config, base.kind, path) for path in paths)
    if config.tied and touched & {embedding, head}:
        if given.get("ensure_weight_tying"):
            tensors.pop(head, None)
        else:
            config = dataclasses.replace(config, tied=False)
            tensors.setdefault(head, tensors[embedding])
    return config, tensors
