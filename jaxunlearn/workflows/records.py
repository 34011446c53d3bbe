# SPDX-License-Identifier: Apache-2.0
"""JSON files of the workflows, and the digests by which a command resumes.

A result is stored with a key: the digest of everything that it depends on. A command
that runs again computes the key again and keeps the result if the keys are equal.
Files are replaced in one step, so a reader sees the old file or the new one. NaN and
infinity are written as null.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn import trees
from jaxunlearn.io import log
from jaxunlearn.typing import Model, Params


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def params_digest(params: Params) -> str:
    """SHA-256 of the paths, dtypes, shapes and bits of all leaves."""
    total = hashlib.sha256()
    for path, leaf in sorted(trees.paths(params).items()):
        if leaf is None:
            continue
        array = np.ascontiguousarray(np.asarray(leaf))
        total.update(f"{path} {array.dtype} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8))
    return total.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's rules and its end token."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # state that every call may change
        rules.pop(name, None)
    return digest([rules, tokenizer.eos_token])


def model_key(model: Model, params: Params, tokenizer: Any) -> list[str]:
    """Everything of a model that its answers depend on, as digests."""
    return [params_digest(params), repr(model.config), tokenizer_digest(tokenizer)]


def versions(*libraries: str) -> dict[str, str]:
    """The installed version of each library."""
    return {name: metadata.version(name) for name in libraries}


def devices() -> str:
    """Number and kind of the devices, such as "1 x cpu"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def read(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    """Writes a value as JSON."""
    text = json.dumps(log.plain(value), ensure_ascii=False, indent=1)
    replace(path, text + "\n")


def read_lines(path: Path) -> list[Any]:
    """The values in a JSON lines file."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_lines(path: Path, values: Iterable[Any]) -> str:
    """Writes JSON lines; returns the SHA-256 of the file."""
    text = "".join(
        json.dumps(log.plain(value), ensure_ascii=False) + "\n" for value in values
    )
    replace(path, text)
    return file_digest(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_folder(owner: str, path: Path) -> Path:
    """Makes a folder with its parents, and a file in it that is deleted at once.

    Args:
        owner: names the command in an error.
        path: the folder; it may exist.
    Returns:
        `path`.
    Raises:
        OSError: naming the folder and the option --output, if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise type(error)(
            f"{owner} needs an output folder that it can write, got {path}: "
            f"{error.strerror or error}. Name another place with --output."
        ) from error
    return path


def replace(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 in one step; missing parent folders are made.

    A surrogate without its pair, which UTF-8 cannot have, is written as JSON's escape.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, "utf-8", "backslashreplace", newline="\n")
    os.replace(fresh, path)
