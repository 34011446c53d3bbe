# SPDX-License-Identifier: Apache-2.0
"""Compares evaluated models on one page that needs nothing beside it.

    python -m jaxunlearn.workflows.report.run RUN [RUN ...] --output runs/report

A RUN is a folder of jaxunlearn/workflows/evaluation/run.py, or one right above several. The output
folder gets report.html, report.md and the figures as PNG: numbers of the original, the
retrained and the unlearned models with intervals, forgetting against utility, tokens of
rows to forget coloured by log-probability, curves of training and of attacks with the
robustness card where a run has them, versions and commands. Exit status 2: runs that
cannot be compared, or are not there.
"""

import argparse
import base64
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxunlearn.workflows.evaluation import folder as folders
from jaxunlearn.workflows.report import attacks, figures, read, tables, tokens

TEMPLATES = Path(__file__).parent
LIBRARIES = ("jinja2", "matplotlib")
REFUSED = (ValueError, OSError, ImportError)


def write(
    runs: Sequence[read.Run],
    output: str | Path,
    *,
    title: str = "Did it forget?",
    note: str = "",
    examples: int = 8,
    command: str = "",
) -> Path:
    """Writes report.html, report.md and figures into a folder.

    Args:
        runs: as read.load gives them.
        output: the folder; files of these names in it are replaced.
        title, note: what stands on top.
        examples: rows to forget whose tokens are shown, at most.
        command: told at the end.
    Returns:
        The path of report.html.
    Raises:
        ValueError: for a negative number of examples.
    """
    if examples < 0:
        raise ValueError(f"A report needs examples >= 0, got {examples}.")
    output = Path(output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Any] = {
        "trade_off": figures.trade_off(runs, output / "forget_utility.png"),
        "training": figures.training(runs, output / "training.png"),
        "attacks": _attacks(runs, output),
    }
    page = {
        "title": title,
        "note": note,
        "runs": runs,
        "words": tables.in_words(runs),
        "headline": tables.headline(runs),
        "tables": tables.of_tasks(runs),
        "colours": figures.colours(runs),
        "examples": tokens.examples(runs, most=examples),
        "scale": tokens.scale(),
        "attack_tables": [x for run in runs for x in tables.of_attacks(run)],
        "versions": _versions(runs),
        "made": {name: metadata.version(name) for name in LIBRARIES},
        "left_out": _left_out(runs),
        "command": command,
        **drawn,
    }
    for name in ("report.md", "report.html"):
        folders.replace(output / name, _render(name.replace("report", "page"), page))
    return output / "report.html"


def _attacks(runs, output: Path) -> list[figures.Figure]:
    found = []
    for number, run in enumerate(runs):
        for name, attack in attacks.curves(run).items():
            file = output / f"attack_{number}_{name}.png"
            drawn = figures.attack(name, attack, file)
            if drawn:
                caption = f"{drawn.caption}: {run.name}"
                found.append(drawn._replace(caption=caption))
    return found


def _versions(runs) -> list[tuple[str, str]]:
    """(library, its version, or each model's where they differ)."""
    names = dict.fromkeys(name for run in runs for name in run.about["versions"])
    found = []
    for name in names:
        each = {run.name: run.about["versions"].get(name, "–") for run in runs}
        same = len(set(each.values())) == 1
        told = ", ".join(f"{version} ({run})" for run, version in each.items())
        found.append((name, next(iter(each.values())) if same else told))
    return found


def _left_out(runs) -> list[str]:
    """Rows that were too long, a line a task."""
    found: dict[str, None] = {}
    for run in runs:
        for task, ids in (run.about.get("left_out") or {}).items():
            if ids:
                found[f"{task}: {len(ids)} ({', '.join(map(str, ids))})"] = None
    return list(found)


def _render(template: str, page: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["picture"] = _picture
    environment.filters["cell"] = _cell
    return environment.get_template(template).render(page)


def _picture(file: Path) -> str:
    """A PNG file as an address that holds all of it."""
    text = base64.b64encode(file.read_bytes()).decode()
    return f"data:image/png;base64,{text}"


def _cell(text: Any) -> str:
    """Text that cannot break a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the runs, writes the page and says where it is."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="an evaluation folder")
    parser.add_argument("--output", default="runs/report", help="folder to write")
    parser.add_argument("--title", default="Did it forget?")
    parser.add_argument("--note", default="", help="what stands under the title")
    parser.add_argument(
        "--examples", type=int, default=8, help="rows whose tokens are shown"
    )
    given = parser.parse_args(argv)
    try:
        page = write(
            read.load(given.runs),
            given.output,
            title=given.title,
            note=given.note,
            examples=given.examples,
            command="python -m jaxunlearn.workflows.report.run " + shlex.join(argv),
        )
    except REFUSED as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"The report is in {page}.")


if __name__ == "__main__":
    main()
