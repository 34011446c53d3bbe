# SPDX-License-Identifier: Apache-2.0
"""README and plots of RTT in both worlds, from their lines.

`python -m experiments.rtt.figures` draws all again from results/*.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.rtt.small import page as small_page
from experiments.rtt.small import score as small_score
from experiments.rtt.smollm2 import page as smollm2_page
from experiments.rtt.smollm2 import score as smollm2_score
from experiments.shared import command, page

Line = Mapping[str, Any]

FOLDER = Path(__file__).resolve().parent
PAGES = {"small": small_page, "smollm2": smollm2_page}
SCORES = {"small": small_score, "smollm2": smollm2_score}


def write(
    name: str, lines: Sequence[Line], about: Mapping[str, Any], folder: Path
) -> None:
    """results/NAME.json and .png, and README.md."""
    rows = SCORES[name].summarise(lines)
    content = {"about": about, "summary": rows}
    content |= {"claim": SCORES[name].claim(lines, rows), "lines": list(lines)}
    page.publish(folder, name, content, readme, PAGES[name].draw)


def readme(results: Mapping[str, Any]) -> list[str]:
    """The lines of README.md."""
    commands, minutes, verdict, sections = [], [], [], []
    for name, content in results.items():
        commands.append(f"python -m experiments.rtt.run --world {name}")
        spent = sum(x.get("seconds", 0.0) for x in content["lines"]) / 60
        minutes.append(f"{spent:.0f} minutes in `{name}`")
        rows = SCORES[name].summarise(content["lines"])
        found = SCORES[name].claim(content["lines"], rows)
        sections += PAGES[name].lines(content, rows, found, f"results/{name}.png")
        verdict.append(f"{PAGES[name].TITLE}: {PAGES[name].verdict(content, found)}")
    out = page.head(
        "RTT: do forgotten facts return when other facts are retrained?",
        claim="After unlearning, retraining on some of the facts brings back most of "
        "the others that the model knew from pretraining, and much less of facts that "
        "were finetuned in ([arXiv 2410.08827](https://arxiv.org/abs/2410.08827)).",
        command="\n".join(commands),
        time=f"The runs of the committed results took {' and '.join(minutes)}, on a "
        "few CPU cores shared with other work.",
        setup="Facts are dealt into folds. Methods unlearn all of them; an attacker "
        "trains on all folds but one and is scored on the fold held out. Details are "
        "with each world below.",
        verdict=verdict,
    )
    return out + sections


PLOTS = {name: each.draw for name, each in PAGES.items()}
SUMMARIES = {name: each.summarise for name, each in SCORES.items()}

if __name__ == "__main__":
    command.main(lambda found: page.redraw(FOLDER, readme, PLOTS), __doc__)
