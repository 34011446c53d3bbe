# SPDX-License-Identifier: Apache-2.0
"""The options that `forget`, `finetune` and `plan` share, and the config they make."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from jaxunlearn.commands import _prompt

PATH = click.Path()
ROWS = 8  # of each stream at a step
OF_MODEL = (
    click.option(
        "--model",
        help='A folder, .gguf file, LoRA adapter, name on the hub, or "smollm2".',
    ),
    click.option("--learning-rate", type=float, help="[the method's]"),
    click.option("--batch-size", type=int, help="Rows of each stream at a step. [8]"),
    click.option("--length", type=int, help="Tokens of a row. [the longest row's]"),
    click.option(
        "--lora-rank", type=int, help="Train only LoRA of this rank. [0: off]"
    ),
    click.option(
        "--num-microbatches", type=int, help="Parts of a batch: less memory. [1]"
    ),
    click.option(
        "--rounding",
        help="Of updates to weights below float32: nearest, stochastic, or masters "
        "(float32 copies). [nearest]",
    ),
    click.option(
        "--mesh",
        help="Devices, as in data=1,fsdp=-1,tensor=1; -1 takes the rest. [fsdp=-1]",
    ),
    click.option("--config", "file", type=PATH, help="A file with get_config()."),
    click.option(
        "--set",
        "pairs",
        multiple=True,
        metavar="KEY=VALUE",
        help="An argument of the method (beta=0.2), or any setting of the run "
        "(model.remat=none). May be repeated.",
    ),
)
OF_RUN = (
    click.option(
        "--stream",
        "more",
        multiple=True,
        metavar="NAME=FILE",
        help="A further stream that the method reads, or that is only scored.",
    ),
    click.option("--prompt-column", help="In all files. [prompt, or question]"),
    click.option(
        "--answer-column",
        help='In all files; "" for running text in a column text. [answer]',
    ),
    click.option("--steps", type=int, help="Updates in all. [5 passes over the rows]"),
    click.option("--save-every", type=int, help="Steps between checkpoints. [10]"),
    click.option("--seed", type=int, help="Of the order of rows. [0]"),
    click.option("--output", type=PATH, help="The run's folder."),
)


def options(*groups: Sequence[Callable]) -> Callable[[Callable], Callable]:
    """Adds groups of options to a command, in their order."""

    def decorate(function: Callable) -> Callable:
        for option in reversed([each for group in groups for each in group]):
            function = option(function)
        return function

    return decorate


def make(
    mode: str,
    method: str | None,
    files: Mapping[str, str | None],
    given: dict[str, Any],
) -> Any:
    """The config of a command line: the config file's, or the defaults, changed by what
    is given.

    Args:
        mode: "unlearn" or "finetune".
        method: full or short name of the recipe.
        files: stream -> its file; None where none is given.
        given: the values of the options by name; None where an option is not given.
    Raises:
        ValueError, TypeError: naming what is wrong or missing.
    """
    from jaxunlearn.workflows import config_file
    from jaxunlearn.workflows.training import settings

    file = given["file"]
    config = config_file.load(file) if file else settings.defaults()
    if not file:
        config.mode, config.steps = mode, 0
    places = {
        "model": "model.path",
        "num_microbatches": "num_microbatches",
        "rounding": "rounding",
        "lora_rank": "lora.rank",
        "steps": "steps",
        "save_every": "save_every",
        "seed": "seed",
        "output": "output",
    }
    with config.unlocked():
        if method:
            config.recipe.name = settings.method(method)
        for option, place in places.items():
            if given.get(option) is not None:
                config.update_from_flattened_dict({place: given[option]})
        if given["learning_rate"] is not None:
            config.recipe.args.learning_rate = given["learning_rate"]
        if given["mesh"]:
            config.mesh.update(_mesh(given["mesh"]))
        config.prompt_format.update(_prompt.given(given))
        _add_streams(config, files, given)
        settings.assign(config, config_file.pairs(given["pairs"]))
    return config


def _add_streams(config: Any, files: Mapping[str, str | None], given: dict) -> None:
    """Files into config.data, and the options of rows into every stream of a file."""
    from jaxunlearn.workflows import config_file

    files = {name: file for name, file in files.items() if file}
    files |= config_file.pairs(given.get("more", ()), "--stream")
    for name, file in files.items():
        path = str(Path(file).expanduser().absolute())
        config.data[name] = dict(source="file", path=path, rows=ROWS)
    columns = {
        "batch_size": "rows",
        "length": "length",
        "prompt_column": "prompt",
        "answer_column": "answer",
    }
    for name, stream in config.data.items():
        for option, key in columns.items():
            value = given.get(option)
            general = key in ("rows", "length")
            if value not in (None, False) and (general or name in files):
                stream[key] = value


def _mesh(text: str) -> dict[str, int]:
    """{"fsdp": 8} of "fsdp=8"."""
    from jaxunlearn import _checks, sharding
    from jaxunlearn.workflows import config_file

    sizes = {}
    for axis, size in config_file.pairs(text.split(","), "--mesh").items():
        _checks.one_of("--mesh", sharding.AXES, axis=axis)
        if not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"--mesh needs whole numbers, as in fsdp=8, got {axis}={size}."
            )
        sizes[axis] = int(size)
    if "fsdp" not in sizes and -1 not in sizes.values():
        sizes["fsdp"] = 1
    return sizes


def run(config: Any) -> None:
    """Runs a checked config from the command line."""
    import shlex
    import sys

    from jaxunlearn import sharding
    from jaxunlearn.workflows.training import run as training
    from jaxunlearn.workflows.training import settings

    config = settings.check(config)
    if config.distributed.join:
        c = config.distributed
        given = (c.coordinator, c.processes, c.process) if c.coordinator else ()
        sharding.initialize(*given)
    training.run(
        config,
        command=shlex.join(["jaxunlearn", *sys.argv[1:]]),
        log_fn=click.echo,
        progress=sys.stderr.isatty(),
    )


def require(options: Mapping[str, str | None]) -> None:
    """Raises ValueError unless every option is given."""
    missing = [name for name, value in options.items() if not value]
    if missing:
        raise click.UsageError(
            f"Without --config, {', '.join(options)} are needed; "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing."
        )
