# SPDX-License-Identifier: Apache-2.0
"""Finds out what a path is (folder, GGUF file, adapter, name on the hub) and opens it.

Only settings, headers and the tokenizer are read here; weights are read later.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.io import (
    _adapter,
    _assemble,
    _gguf,
    _hf_config,
    _hub,
    _names,
    _safetensors,
    _tokenizer,
)

GENERATION = "generation_config.json"


def checkpoint(
    path: str | os.PathLike, compute_dtype: str, remat: str, base: Any = None
) -> _assemble.Source:
    """The checkpoint at a path, or of a name on the hub, which is downloaded.

    Arguments and errors are those of `hf.load`.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.exists():
            folder = _download(path)
        names = []
        if folder.is_dir():
            names = sorted(file.name for file in folder.iterdir())
        if _adapter.is_adapter(names):
            return _open_adapter(folder, compute_dtype, remat, base)
        if base is not None:
            raise ValueError(
                f"hf.load needs an adapter (adapter_config.json) with base, got "
                f"{folder} and base={os.fspath(base)!r}. Leave out base."
            )
        if folder.is_file():
            return _open_file(folder, compute_dtype, remat)
        ggufs = _hub.models(names)
        weights = any(map(_safetensors.usable, names)) and "config.json" in names
        if len(ggufs) == 1 and not weights:
            return _open_file(folder / ggufs[0], compute_dtype, remat)
        if ggufs and not weights:
            raise _hub.several(folder, ggufs)
        if "config.json" not in names:
            raise FileNotFoundError(
                f"hf.load needs config.json and safetensors, or one .gguf file, got "
                f"{folder} with {_checks.listed(names)}. Check the path."
            )
        if _hub.ADAPTER in names:
            warnings.warn(
                f"{folder} has the weights of a model and {_hub.ADAPTER}; the adapter "
                "is not merged. Move it to a separate folder to merge it.",
                stacklevel=3,
            )
        return _open_folder(folder, compute_dtype, remat)
    except PermissionError as error:
        raise PermissionError(
            f"hf.load needs to read {folder}, got {error.strerror or error}. "
            "Change its permissions, or copy it."
        ) from error


def _open_adapter(
    folder: Path, compute_dtype: str, remat: str, base: Any
) -> _assemble.Source:
    """The base model of an adapter, with the adapter merged."""
    given = _adapter.settings(folder)
    named = given.get("base_model_name_or_path")
    if base is None and not named:
        raise ValueError(
            f"hf.load needs the base model of the adapter {folder}, got none in "
            "adapter_config.json. Give it: hf.load(adapter, base='path/or/name')."
        )
    base = named if base is None else base
    in_folder = folder / Path(base)
    revision = given.get("revision")
    try:
        if not Path(base).expanduser().exists() and in_folder.exists():
            base = in_folder
        elif not Path(base).expanduser().exists() and _hub.is_name(base) and revision:
            base = _hub.download(os.fspath(base), revision)
        source = checkpoint(base, compute_dtype, remat)
    except (FileNotFoundError, OSError) as error:
        raise type(error)(
            f"hf.load needs the base model of the adapter {folder}, got "
            f"{os.fspath(base)!r}: {error} Or give another place: hf.load(adapter, "
            "base='path/or/name')."
        ) from error
    merged = _adapter.merge(source, folder, given)
    tokenizer = _tokenizer.load(folder)
    return merged if tokenizer is None else merged._replace(tokenizer=tokenizer)


def _open_file(file: Path, compute_dtype: str, remat: str) -> _assemble.Source:
    if file.suffix != ".gguf":
        raise ValueError(
            f"hf.load needs a folder, a .gguf file or a name on the hub, got the file "
            f"{file}. Give the folder that contains config.json and the weights."
        )
    gguf = _gguf.open_file(file)
    config = _gguf.config(gguf, compute_dtype=compute_dtype, remat=remat)
    built = _gguf.tokenizer(gguf)
    return _assemble.Source(config, "gguf", file, gguf.tensors, _gguf.read, built)


def _open_folder(folder: Path, compute_dtype: str, remat: str) -> _assemble.Source:
    file, generation = folder / "config.json", folder / GENERATION
    text = _json(file)
    if generation.is_file():
        given = json.loads(_json(generation))
        text = json.dumps(json.loads(text) | {_hf_config.GENERATION: given})
    try:
        config = _hf_config.parse(text, compute_dtype=compute_dtype, remat=remat)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} These settings are those of {file}.") from error
    (tensors, unlisted), others = _safetensors.entries(folder), []
    if _hf_config.is_multimodal(text):
        tensors, others = _names.text_part(tensors)
    tensors = _names.renamed(config, tensors)
    kind = _names.kind_of(config, tensors)
    wanted = _names.tensors(config, kind)
    if unlisted:
        used = [n for n, entry in tensors.items() if n in wanted and entry in unlisted]
        names = _checks.listed(sorted(unlisted.values()), 4)
        warnings.warn(
            f"The index of {folder} does not list {names}, which its files contain; "
            f"{len(used)} of them belong to the model and are used.",
            stacklevel=4,
        )
        tensors = {n: e for n, e in tensors.items() if n in wanted or e not in unlisted}
    _safetensors.check_dtypes({n: e for n, e in tensors.items() if n in wanted})
    built = _tokenizer.load(folder)
    return _assemble.Source(
        config, kind, folder, tensors, _safetensors.read, built, tuple(others)
    )


def _json(file: Path) -> str:
    """The text of a file that holds one JSON object."""
    try:
        text = file.read_text(encoding="utf-8")
        if not isinstance(json.loads(text), dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"hf.load needs JSON in {file}, got text that does not parse ({error}). "
            "Copy or download it again."
        ) from error
    return text


def _download(name: str | os.PathLike) -> Path:
    if not _hub.is_name(name):
        raise FileNotFoundError(
            f"hf.load needs a folder, a .gguf file or a name on the hub such as "
            f"'owner/model', got {os.fspath(name)!r}, which does not exist. Check the "
            "path."
        )
    return _hub.download(os.fspath(name))
