# SPDX-License-Identifier: Apache-2.0
"""Config files and single settings: Python files with `get_config()`, KEY=VALUE pairs.

For example:

    config = config_file.load("experiments/configs/evaluate.py:05")
    config_file.assign(config, {"score.new_tokens": "32"}, free=("tasks",))
"""

import ast
import runpy
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxunlearn import _checks


def load(name: str) -> ConfigDict:
    """The config that a file's get_config() returns.

    Args:
        name: FILE.py, or FILE.py:ARGUMENT, which calls get_config(ARGUMENT).
    Raises:
        ValueError: if the file is not there or has no get_config().
        Exception: what the file itself raises.
    """
    path, _, argument = name.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"--config needs a Python file with get_config(), got {path}.")
    module = runpy.run_path(path)
    if "get_config" not in module:
        raise ValueError(f"--config needs a get_config() in the file, got {path}.")
    return module["get_config"](*([argument] if argument else []))


def assign(
    config: ConfigDict,
    given: Mapping[str, str],
    *,
    free: Collection[str] = (),
    owner: str = "--set KEY=VALUE",
) -> None:
    """Sets settings by their dotted names, each once its key and type are right.

    Args:
        config: changed in place.
        given: dotted name -> the value as text, a Python literal or plain text.
        free: dotted names of parts where any key may be added.
        owner: begins the errors.
    Raises:
        ValueError: for an unknown key, with the nearest one.
        TypeError: for a value of another type than the setting's.
    """
    for key, text in given.items():
        *parents, last = key.split(".")
        inside = any(key.startswith(f"{part}.") for part in free)
        if not inside:
            _checks.one_of(owner, sorted({*leaves(config), *free}), key=key)
        place = config
        for name in parents:
            if name not in place:
                place[name] = ConfigDict()
            place = place[name]
        old = place.get(last)
        value = text if isinstance(old, str) else literal(text)
        try:
            place[last] = value
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{owner} needs a value of type {type(old).__name__} for {key}, got "
                f"{key}={text}."
            ) from error


def pairs(texts: Iterable[str], option: str = "--set") -> dict[str, str]:
    """{"a": "1"} of ["a=1"].

    Raises:
        ValueError: for a text without "=".
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key.strip() and equals):
            raise ValueError(f"{option} needs KEY=VALUE, got {text!r}.")
        found[key.strip()] = value.strip()
    return found


def literal(text: str) -> Any:
    """The Python value that a text writes; the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def leaves(config: ConfigDict | Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"
