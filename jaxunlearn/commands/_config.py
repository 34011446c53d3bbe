# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` and `attack` share: --config, --set, and lines of progress."""

import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import click


def options(function: Callable) -> Callable:
    """Adds --config FILE and --set KEY=VALUE."""
    config = click.option(
        "--config",
        metavar="FILE.py[:ARGUMENT]",
        help="A Python file with get_config(), for settings without an option.",
    )
    settings = click.option(
        "--set",
        "settings",
        metavar="KEY=VALUE",
        multiple=True,
        help="Any setting of a config, such as prompt_format.prompt=TEXT.",
    )
    return config(settings(function))


def read(
    file: str | None,
    defaults: Mapping[str, Any],
    settings: Sequence[str],
    free: Collection[str] = (),
) -> dict[str, Any]:
    """The settings that were given: all of a config file's, and those of --set.

    Args:
        file: of --config.
        defaults: every setting with its default.
        settings: texts KEY=VALUE.
        free: parts where any key may be added.
    Raises:
        ValueError: for an unknown key, with the nearest one.
    """
    from ml_collections import ConfigDict

    from jaxunlearn.workflows import config_file

    config = config_file.load(file) if file else ConfigDict(defaults)
    given = config_file.pairs(settings)
    with config.unlocked():
        config_file.assign(config, given, free=free)
    found = config.to_dict()
    if file:
        return found
    chosen: dict[str, Any] = {}
    for key in given:
        *parents, last = key.split(".")
        source, target = found, chosen
        for name in parents:
            source, target = source[name], target.setdefault(name, {})
        target[last] = source[last]
    return chosen


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers between commas.

    Raises:
        ValueError: for a text that is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"{option} needs numbers between commas, got {text!r}."
        ) from error


def command_line() -> str:
    """The command line, as files record it."""
    return "jaxunlearn " + shlex.join(sys.argv[1:])


def log(line: str) -> None:
    """Prints a line of progress to standard error."""
    click.echo(line, err=True)
