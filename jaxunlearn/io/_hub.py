# SPDX-License-Identifier: Apache-2.0
"""Downloads the files of a model from the Hugging Face hub, its weights once.

A repository often holds the same weights several times: under the names of another
library (consolidated.safetensors), as pickles, for other runtimes, and in several
quantizations. The list of its files decides what is fetched. Without a list (offline,
for example) the patterns of the usual names are used.
"""

import glob
import os
import re
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.io import _safetensors

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OWNER = "hf.load"
_SETTINGS = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_WEIGHTS = [_safetensors.SINGLE, "model-*-of-*.safetensors", ADAPTER_WEIGHTS]
_NAME = r"[\w.-]+/[\w.-]+"


def is_name(path: str | os.PathLike) -> bool:
    """Whether `path` can be a name on the hub, or one of a file there."""
    text = os.fspath(path)
    if isinstance(path, Path) or text.startswith((".", "~", "/")) or "\\" in text:
        return False
    return bool(re.fullmatch(rf"{_NAME}(/.+\.gguf)?", text))


def download(name: str, revision: str | None = None) -> Path:
    """The local copy of a model; files that contain code are excluded.

    Args:
        name: "owner/model", or "owner/model/file.gguf" for one file.
        revision: branch, tag or commit; None for the default branch.
    Returns:
        The folder, or the GGUF file.
    Raises:
        FileNotFoundError: if there are several GGUF files and none is named, or the
            named one is absent.
        OSError: if the hub cannot be reached.
    """
    hub = _checks.library(
        f"Downloading {name!r}", "huggingface_hub", "hf", ", or give a local folder"
    )
    owner, model, *rest = name.split("/", 2)
    repository, more = (
        f"{owner}/{model}",
        {} if revision is None else {"revision": revision},
    )
    names = _listed(hub, repository, more)
    if rest:
        return _one_file(hub, repository, rest[0], names, more)
    if names is None:
        return _by_patterns(hub, repository, more)
    top = [name for name in names if "/" not in name]
    settings = [
        name
        for name in names
        if name.startswith("additional_chat_templates/")
        or ("/" not in name and any(Path(name).match(p) for p in _SETTINGS))
    ]
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights or ("config.json" not in top and ADAPTER not in top):
        ggufs = models(names)
        if len(ggufs) == 1:
            return _one_file(hub, repository, ggufs[0], names, more)
        if ggufs:
            raise several(repository, ggufs)
    if _safetensors.SINGLE in top:
        weights = [_safetensors.SINGLE]
    elif _safetensors.INDEX in top:
        folder = _fetch(hub, repository, settings, more)
        places = _safetensors.index(folder / _safetensors.INDEX)
        weights = sorted(set(places.values()))
    elif ADAPTER in top:
        weights = [ADAPTER_WEIGHTS]
    else:
        weights = [name for name in weights if _safetensors.usable(name)]
    return _fetch(hub, repository, [*settings, *weights], more)


def models(names: list[str]) -> list[str]:
    """The GGUF files that hold a language model."""
    others = ("mmproj", "imatrix")
    return [
        name
        for name in sorted(names)
        if name.endswith(".gguf") and not Path(name).name.startswith(others)
    ]


def several(where: object, ggufs: list[str]) -> FileNotFoundError:
    """The error for a folder or repository with several GGUF files."""
    return FileNotFoundError(
        f"{_OWNER} needs one .gguf file, got {where} with {_checks.listed(ggufs, 30)}. "
        f"Name one of them: '{where}/{ggufs[0]}'."
    )


def _listed(hub: Any, repository: str, more: dict) -> list[str] | None:
    """The names of all files of a repository, None if the hub gives no list."""
    try:
        return list(hub.list_repo_files(repository, **more))
    except Exception:  # the download itself reports why the hub cannot be reached
        return None


def _one_file(hub, repository: str, name: str, names, more: dict) -> Path:
    file = None
    if names is None or name in names:
        file = _fetch(hub, repository, [name], more) / name
    if file is None or not file.is_file():
        ggufs = models(names or [])
        raise FileNotFoundError(
            f"{_OWNER} needs a file of {repository!r}, got {name!r}, which it lacks. "
            f"Its GGUF files: {_checks.listed(ggufs, 30)}."
        )
    return file


def _by_patterns(hub, repository: str, more: dict) -> Path:
    folder = _fetch(hub, repository, None, more)
    names = [file.name for file in folder.iterdir()]
    if "config.json" in names or ADAPTER in names or models(names):
        return folder
    return _fetch(hub, repository, None, more, "*.gguf")


def _fetch(hub, repository: str, names: list[str] | None, more: dict, *also) -> Path:
    """The local folder with these files, or those of the usual names for None."""
    patterns = [*_WEIGHTS, *_SETTINGS, *also]
    if names is not None:
        patterns = [glob.escape(name) for name in names]
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns, **more))
    except (
        Exception
    ) as error:  # the client raises its errors and those of its HTTP library
        first = next(iter(str(error).strip().splitlines()), "")
        raise OSError(
            f"{_OWNER} needs the files of {repository!r}, which is not a local folder, "
            f"and the download failed: {type(error).__name__}: {first} Check the name "
            "and the network, or download it elsewhere and give its local folder."
        ) from error
