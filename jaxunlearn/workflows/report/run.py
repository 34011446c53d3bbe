# SPDX-License-Identifier: Apache-2.0
"""Writes a self-contained page that compares evaluated models.

    write(read.load(["runs/a", "runs/b"]), "runs/report")

The output folder gets report.html (with all figures inside), report.md and the figures
as PNG: numbers of the original, the retrained and the unlearned models with intervals,
forgetting against utility, the tokens of forget rows coloured by log-probability,
curves of training and of attacks, robustness cards, versions and commands.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.workflows import records
from jaxunlearn.workflows.report import attacks, figures, read, tables, tokens

TEMPLATES = Path(__file__).parent
LIBRARIES = ("jinja2", "matplotlib")


def write(
    models: Sequence[read.ModelResults],
    output: str | Path,
    *,
    attack_results: Sequence[read.AttackResults] = (),
    title: str = "Did it forget?",
    note: str = "",
    examples: int = 8,
    command: str = "",
) -> Path:
    """Writes report.html, report.md and figures into a folder.

    Args:
        models: as read.load gives them.
        output: the folder; files of these names in it are replaced.
        attack_results: attacks on other models, as read.load_attacks gives them.
        title, note: the title, and a text under it.
        examples: maximum number of forget rows whose tokens are shown.
        command: the command line, shown at the end.
    Returns:
        The path of report.html.
    Raises:
        ValueError: for a negative number of examples.
        ImportError: naming the extra, if jinja2 or matplotlib is not installed.
    """
    _checks.not_negative("report", examples=examples)
    for library in LIBRARIES:
        _checks.library("report", library, "hf")
    output = records.make_folder("report", Path(output).expanduser())
    every_attack = [model.attack for model in models if model.attack]
    every_attack += attack_results
    page = {
        "title": title,
        "note": note,
        "models": models,
        "words": tables.in_words(models),
        "headline": tables.headline(models),
        "tables": tables.of_tasks(models),
        "colours": figures.colours(models),
        "examples": tokens.examples(models, max_rows=examples),
        "scale": tokens.scale(),
        "attack_tables": [x for each in every_attack for x in tables.of_attacks(each)],
        "versions": _versions(models),
        "made": records.versions(*LIBRARIES),
        "left_out": _left_out(models),
        "command": command,
        "trade_off": figures.trade_off(models, output / "forget_utility.png"),
        "training": figures.training(models, output / "training.png"),
        "attacks": _attack_figures(every_attack, output),
    }
    for name in ("report.md", "report.html"):
        records.replace(output / name, _render(name.replace("report", "page"), page))
    return output / "report.html"


def _attack_figures(every_attack, output: Path) -> list[figures.Figure]:
    found = []
    for number, results in enumerate(every_attack):
        for name, attack in attacks.curves(results).items():
            file = output / f"attack_{number}_{name}.png"
            drawn = figures.attack(name, attack, file)
            if drawn:
                caption = f"{drawn.caption}: {results.name}"
                found.append(drawn._replace(caption=caption))
    return found


def _versions(models) -> list[tuple[str, str]]:
    """(library, its version, or the version of each model if they differ)."""
    found = []
    for name in dict.fromkeys(x for model in models for x in model.about["versions"]):
        by_model = {m.name: m.about["versions"].get(name, "–") for m in models}
        text = next(iter(by_model.values()))
        if len(set(by_model.values())) > 1:
            text = ", ".join(f"{version} ({m})" for m, version in by_model.items())
        found.append((name, text))
    return found


def _left_out(models) -> list[str]:
    """A line for each task with rows that were too long."""
    found: dict[str, None] = {}
    for model in models:
        for task, ids in (model.about.get("left_out") or {}).items():
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
    """A PNG file as a data URL."""
    text = base64.b64encode(file.read_bytes()).decode()
    return f"data:image/png;base64,{text}"


def _cell(text: Any) -> str:
    """Text that cannot break a Markdown table, and is not read as HTML."""
    text = str(text).replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("\n", " ")
