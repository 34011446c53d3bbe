# SPDX-License-Identifier: Apache-2.0
"""The command line of an experiment: --config, --set and the options it adds.

    python -m experiments.mrp.run --set steps=3 --set world.output=/tmp/worlds

`--set NAME=VALUE` changes one of the experiment's settings, with dots for entries
inside it; `world.NAME` changes one of the config file that --config names. Where an
experiment has no settings but its config file, NAME is one of that file.
"""

import argparse
import difflib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxunlearn import _checks
from jaxunlearn.workflows import config_file

ROOT = Path(__file__).resolve().parents[2]


class Arguments(NamedTuple):
    """What a command line says.

    Attributes:
        config: of the file that --config names, None where a command has no config.
        settings: of the experiment, a NamedTuple or None.
        options: all other options.
    """

    config: ConfigDict | None
    settings: Any
    options: argparse.Namespace


def main(
    body: Callable[[Arguments], None],
    doc: str,
    *,
    config: str = "",
    settings: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs `body` on what the command line says; errors of the user are one line.

    Args:
        body: the program.
        doc: the module's docstring, which --help prints.
        config: the file that is read without --config, from the repository's root, such
            as "experiments/small/configs/biographies.py"; "" if there is none.
        settings: a NamedTuple of defaults that --set changes.
        options: name -> arguments of argparse's add_argument, such as
            {"--minutes": dict(type=float, default=0.0, help="...")}.
        argv: instead of the process's arguments.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        body(read(doc, config, settings, options or {}, argv))
    except KeyboardInterrupt:
        print("Stopped. Run the same command to resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def read(
    doc: str,
    config: str,
    settings: Any,
    options: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None,
) -> Arguments:
    """The arguments of `main`.

    Raises:
        ValueError: for an option or a setting that is not known, with the nearest one
            that is, or a value of another type.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if config:
        parser.add_argument(
            "--config", default=str(ROOT / config), help=f"default: {config}"
        )
    if config or settings is not None:
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"change a setting: {', '.join(_names(settings, config))}",
        )
    for name, arguments in options.items():
        parser.add_argument(name, **arguments)
    parser.add_argument("--debug", action="store_true", help="show a full traceback")
    known = [x for action in parser._actions for x in action.option_strings]
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else " See --help."
        raise ValueError(f"The command does not know the option {unknown[0]}.{hint}")
    content = config_file.load(found.config) if config else None
    for name, value in config_file.pairs(getattr(found, "set", [])).items():
        path = name.split(".")
        if settings is None:
            content = replaced(content, path, value)
        elif path[0] == "world" and config and len(path) > 1:
            content = replaced(content, path[1:], value)
        else:
            settings = replaced(settings, path, value)
    return Arguments(content, settings, found)


def replaced(tree: Any, path: Sequence[str], text: str) -> Any:
    """A copy of a NamedTuple, mapping or ConfigDict with one entry replaced.

    Raises:
        ValueError: for a name that is not there, or a value of another type.
    """
    name, *rest = path
    entries = tree._asdict() if hasattr(tree, "_asdict") else dict(tree.items())
    _checks.one_of("--set", list(entries), name=name)
    old = entries[name]
    if rest and not (isinstance(old, Mapping) or hasattr(old, "items")):
        raise ValueError(f"--set needs a name without entries after {name!r}.")
    new = replaced(old, rest, text) if rest else _value(name, text, old)
    if hasattr(tree, "_replace"):
        return tree._replace(**{name: new})
    if isinstance(tree, ConfigDict):
        return ConfigDict({**tree.to_dict(), name: _plain(new)})
    return {**entries, name: new}


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def _value(name: str, text: str, old: Any) -> Any:
    """The text as a value of the type of `old`."""
    if isinstance(old, str):
        return text
    value = config_file.literal(text)
    if isinstance(old, list | tuple | range):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    if isinstance(old, float) and isinstance(value, int):
        return float(value)
    if old is not None and type(value) is not type(old):
        kind = type(old).__name__
        raise ValueError(f"--set needs {name} of type {kind}, got {name}={text}.")
    return value


def _names(settings: Any, config: str) -> list[str]:
    names = [] if settings is None else list(settings._fields)
    return [*names, *(["world.NAME"] if config and names else [])]
