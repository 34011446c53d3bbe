# SPDX-License-Identifier: Apache-2.0
"""Result pages: Markdown tables, number formats, README.md and JSON.

An experiment's folder has `results/NAME.json` and `.png`, and a README.md that is drawn
from them. Its module of figures has two functions:

    page(results) -> lines of README.md, from {NAME: content of NAME.json}
    plot(content, file): draws NAME.png

`publish` writes all three, `redraw` draws again from the JSON files that are there.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxunlearn.io import log

Content = Mapping[str, Any]
Page = Callable[[Mapping[str, Content]], list[str]]
Plot = Callable[[Content, Path], None]

WORDS = {"holds": "**holds**", "fails": "**fails**", "undecided": "is **undecided**"}


def publish(
    folder: Path, name: str, content: Content, page: Page, plot: Plot | None
) -> None:
    """Writes results/NAME.json and .png, and the README of all results in the folder.

    Args:
        folder: of the experiment, or another one to write to.
        name: of the results, such as "small".
        content: what NAME.json holds.
        page, plot: see the module; `plot` may be None.
    """
    write_json(Path(folder) / "results" / f"{name}.json", content)
    redraw(folder, page, {name: plot} if plot else {})
    print(f"Wrote {folder}/README.md and {folder}/results/{name}.json")


def redraw(folder: Path, page: Page, plots: Mapping[str, Plot]) -> None:
    """Draws README.md and the plots of the JSON files that are in results/ again."""
    found = results(folder)
    for name, plot in plots.items():
        if name in found:
            plot(found[name], Path(folder) / "results" / f"{name}.png")
    write_text(Path(folder) / "README.md", readme(page, found))


def results(folder: Path) -> dict[str, Content]:
    """NAME -> content of results/NAME.json, in the order of names."""
    files = sorted((Path(folder) / "results").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def readme(page: Page, found: Mapping[str, Content]) -> str:
    """The text of README.md."""
    note = "<!-- Drawn from results/*.json by the figures module; do not edit. -->"
    return "\n".join([note, *page(found)]).rstrip() + "\n"


def head(
    title: str,
    *,
    claim: str,
    command: str,
    time: str,
    setup: str,
    verdict: Sequence[str],
) -> list[str]:
    """The first lines of every README.

    Args:
        title: the question or the paper's name.
        claim: one sentence with a link to the paper.
        command: what to type.
        time: how long it takes, and on what.
        setup: what was run, in short.
        verdict: one sentence each.
    """
    return [
        f"# {title}",
        "",
        f"**Claim.** {claim}",
        "",
        "```",
        command,
        "```",
        "",
        f"**Time.** {time}",
        "",
        f"**Setup.** {setup}",
        "",
        "**Verdict.**",
        "",
        *(f"- {sentence}" for sentence in verdict),
        "",
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table and the empty line after it."""
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(map(str, line))} |" for line in lines), ""]


def pm(spread: Sequence[float] | None, digits: int = 3, sign: str = "") -> str:
    """0.123 ± 0.045, of [mean, deviation] or [mean] alone; nothing for None."""
    if spread is None:
        return ""
    deviation = "".join(f" ± {x:.{digits}f}" for x in spread[1:])
    return f"{spread[0]:{sign}.{digits}f}{deviation}"


def share(interval: Sequence[float] | None) -> str:
    """56% [51%, 60%], of [value, low, high]; nothing for None."""
    if interval is None:
        return ""
    return f"{interval[0]:.0%} [{interval[1]:.0%}, {interval[2]:.0%}]"


def bounds(interval: Sequence[float] | None, digits: int = 2) -> str:
    """0.56 [0.51, 0.60], of [value, low, high]; nothing for None."""
    if interval is None:
        return ""
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def numbers(values: Iterable[float]) -> str:
    """1e-05, 0.002, 3"""
    return ", ".join(f"{value:g}" for value in values)


def rate(value: float | None) -> str:
    """A learning rate; nothing for None."""
    return "" if value is None else f"{value:g}"


def seeds(values: Sequence[int]) -> str:
    """seed 0, or seeds 0, 1, 2"""
    return f"seed{'s' if len(values) > 1 else ''} {numbers(values)}"


def spent(lines: Iterable[Content]) -> str:
    """The sum of the lines' `seconds`, as a sentence."""
    minutes = sum(line.get("seconds", 0.0) for line in lines) / 60
    return (
        f"The runs of the committed results took {minutes:.0f} minutes on a few CPU "
        "cores, without compiling and scoring; making the small world takes about five "
        "more."
    )


def plain(content: Any) -> Any:
    """The content as JSON gives it back."""
    return json.loads(json.dumps(log.plain(content)))


def versions(about: Content) -> list[str]:
    """A line with the versions of libraries that the results were made with."""
    each = ", ".join(f"{name} {x}" for name, x in about["versions"].items())
    return [f"Versions: {each}."]


def write_both(prefix: str | Path, content: Any, lines: Iterable[str]) -> None:
    """PREFIX.json with the content and PREFIX.md with the lines."""
    write_json(Path(prefix).with_suffix(".json"), content)
    write_text(Path(prefix).with_suffix(".md"), "\n".join(lines) + "\n")


def write_json(file: Path, content: Any) -> None:
    """JSON with an indent of 1; numbers that JSON cannot hold become null."""
    write_text(file, json.dumps(log.plain(content), indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replaces the file only when the new one is complete."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)
