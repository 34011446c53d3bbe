# SPDX-License-Identifier: Apache-2.0
"""The command line of an experiment in the small world.

    python -m experiments.mrp.run
    python -m experiments.mrp.run --config=experiments/small/configs/tofu.py
    python -m experiments.mrp.run --set steps=3 --set world.output=/tmp/worlds

It makes the world or loads it, runs what the ledger lacks, and writes README.md and
results/ of the experiment's folder. Stopped at any time, the same command resumes.
`--draw` runs nothing and draws from the runs that are in the ledger; `--results FOLDER`
writes to another folder.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import command, ledger
from experiments.small import world

OPTIONS = {
    "--draw": dict(action="store_true", help="run nothing, draw from the ledger"),
    "--results": dict(default="", help="folder of README.md and results/"),
}

Write = Callable[[Sequence[ledger.Line], Mapping[str, Any], Path], None]


def main(
    run: Callable[..., None],
    write: Write,
    doc: str,
    *,
    module: str,
    settings: Any,
    config: str = world.CONFIG,
    about: Callable[[world.World], Mapping[str, Any]] = lambda small: {},
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Reads the command line, then runs and draws an experiment.

    Args:
        run: (world, ledger, settings, values of `options`) -> None; adds what the
            ledger lacks.
        write: (lines, about, folder) -> None; writes results/ and README.md.
        doc: of the module.
        module: such as "experiments.mrp.run"; its ledger is `<world>.mrp.jsonl` in the
            world's output folder.
        settings: a NamedTuple of defaults.
        config: the world's config file.
        about: world -> more that the results say of it.
        options: further options, as for command.main; `run` gets them by name.
    """
    name = module.split(".")[-2]

    def body(found: command.Arguments) -> None:
        small = world.make(found.config, progress=True)
        file = Path(found.config.output).expanduser() / f"{small.digest}.{name}.jsonl"
        if found.options.draw and not file.exists():
            raise ValueError(f"--draw needs the runs in {file}, got no such file.")
        head = ledger.head(found.settings, world=small.digest)
        book = ledger.Ledger(file, head, progress=not found.options.draw)
        if not found.options.draw:
            names = [option.removeprefix("--") for option in options or {}]
            more = {x: getattr(found.options, x) for x in names}
            run(small, book, found.settings, **more)
        known = ledger.plain(found.settings._asdict()) | book.head
        known |= {"parameters": small.about["parameters"]} | ledger.provenance(module)
        folder = found.options.results or command.ROOT / "experiments" / name
        write(book.lines, known | dict(about(small)), Path(folder).expanduser())

    more = OPTIONS | dict(options or {})
    command.main(body, doc, config=config, settings=settings, options=more)
