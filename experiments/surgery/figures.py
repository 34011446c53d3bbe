# SPDX-License-Identifier: Apache-2.0
"""README and plot of LLM Surgery in the small world, from its lines.

`python -m experiments.surgery.figures` draws both again from results/small.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import command, intervals, page, plot

Line = Mapping[str, Any]

FOLDER = Path(__file__).resolve().parent
SETS = ("unlearn", "update", "retain")
PUBLISHED = 0.2  # the paper's gain of accuracy on the update set


def write(lines: Sequence[Line], about: Mapping[str, Any], folder: Path) -> None:
    """results/small.json and .png, and README.md."""
    content = {"about": about, "summary": summarise(lines), "lines": list(lines)}
    page.publish(folder, "small", content, readme, draw)


def balance(line: Line) -> float:
    """update + retain - unlearn accuracy: what the rate is chosen by."""
    found = line["accuracy"]
    return found["update"] + found["retain"] - found["unlearn"]


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For every method, at the rate that ran on most seeds or else the best of the
    sweep: accuracy on each set, [mean, deviation over seeds], and `changes`, the mean
    minus the original's accuracy."""
    before = next(x["accuracy"] for x in lines if x["method"] == "original")
    found = []
    for name in dict.fromkeys(line["method"] for line in lines):
        rates: dict[Any, list[Line]] = {}
        for line in lines:
            if line["method"] == name:
                rates.setdefault(line.get("rate"), []).append(line)
        rate, runs = max(
            rates.items(), key=lambda x: (len(x[1]), balance(x[1][0]), -(x[0] or 0))
        )
        row = {"method": name, "rate": rate, "seeds": len(runs)}
        for each in SETS:
            row[each] = intervals.spread([x["accuracy"][each] for x in runs], ddof=0)
        row["finite"] = all(line.get("finite", True) for line in runs)
        row["changes"] = {each: row[each][0] - before[each] for each in SETS}
        found.append(row)
    return found


def readme(results: Mapping[str, Any]) -> list[str]:
    """The lines of README.md."""
    about, lines = results["small"]["about"], results["small"]["lines"]
    rows = summarise(lines)
    seeds = max(row["seeds"] for row in rows)
    verdict = [
        f"{row['method']}: accuracy on the unlearn set "
        f"{row['changes']['unlearn']:+.3f}, on the update "
        f"set {row['changes']['update']:+.3f} (the paper's "
        f"+{PUBLISHED:g} is {'' if row['changes']['update'] >= PUBLISHED else 'not '}"
        f"reached), on the retain set {row['changes']['retain']:+.3f}."
        for row in rows
        if row["rate"] is not None
    ]
    verdict.append(
        f"Numbers are means over {seeds} seed{'s' if seeds > 1 else ''} minus the "
        f"original's accuracy, on at most {about['num_scored']} questions of each set; "
        "differences of a few hundredths are within the spread of the table."
    )
    return [
        *page.head(
            "LLM Surgery: old facts out, new facts in",
            claim="A sum of ascent on old text, NLL on new text and KL on the rest "
            "lowers accuracy on the old facts, gains about 0.2 on the new ones and "
            "retains the rest ([arXiv 2409.13054](https://arxiv.org/abs/2409.13054)).",
            command="python -m experiments.surgery.run",
            time=page.spent(lines),
            setup=f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
            f"`{about['world']}`; {about['steps']} steps of {about['batch_size']} rows "
            f"of each stream, {seeds} seed{'s' if seeds > 1 else ''}; rates "
            f"{page.numbers(about['rates'])} on the first seed. Multiple-choice "
            "questions of three options; chance is 0.333. The *baseline* "
            "is the retrained model, trained on the new facts and those to retain.",
            verdict=verdict,
        ),
        "![Accuracy on the three sets](results/small.png)",
        "",
        "Accuracy, mean ± standard deviation over seeds (the deviation divides by "
        "their number).",
        "",
        *page.table(
            ["method", "rate", "seeds", *SETS],
            [
                [
                    row["method"] + ("" if row["finite"] else " (stopped: not finite)"),
                    page.rate(row["rate"]),
                    row["seeds"],
                    *(page.pm(row[each]) for each in SETS),
                ]
                for row in rows
            ],
        ),
        *page.versions(about),
    ]


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Accuracy of every method on the three sets."""
    rows = summarise(content["lines"])
    with plot.saved(file, size=(9, 4.2)) as (_, grid):
        axis = grid[0, 0]
        labels = [row["method"].replace(", ", ",\n") for row in rows]
        series = {each: [row[each] for row in rows] for each in SETS}
        plot.bars(axis, labels, series, rotation=0)
        axis.axhline(1 / 3, color="black", linestyle=":", linewidth=1)
        axis.set_ylabel("accuracy, three options")
        axis.legend(fontsize=8)


PLOTS, SUMMARIES = {"small": draw}, {"small": summarise}

if __name__ == "__main__":
    command.main(lambda found: page.redraw(FOLDER, readme, PLOTS), __doc__)
