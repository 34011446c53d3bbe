# SPDX-License-Identifier: Apache-2.0
"""README and plot of SemEval-2025 Task 4 in the small world, from its lines.

`python -m experiments.semeval.figures` draws both again from results/small.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import command, intervals, page, plot

Line = Mapping[str, Any]

FOLDER = Path(__file__).resolve().parent
PARTS = ("final", "task_aggregate", "mia_score", "mmlu")
REFERENCES = ("original", "retrained", "collapsed")


def write(lines: Sequence[Line], about: Mapping[str, Any], folder: Path) -> None:
    """results/small.json and .png, and README.md."""
    content = {"about": about, "summary": summarise(lines), "lines": list(lines)}
    page.publish(folder, "small", content, readme, draw)


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For every method, at the rate that ran on most seeds or else the best of the
    sweep: each part, the AUC and the twelve terms, [mean, deviation over seeds].

    Methods above the floor on every seed come first, by final score; the reference
    models come last.
    """
    found = []
    for name in dict.fromkeys(line["method"] for line in lines):
        rates: dict[Any, list[Line]] = {}
        for line in lines:
            if line["method"] == name:
                rates.setdefault(line.get("rate"), []).append(line)

        def value(item):
            rate, runs = item
            ranked = not runs[0]["below_floor"]
            measure = runs[0]["final" if ranked else "mmlu"]
            return len(runs), ranked, measure, -(rate or 0)

        rate, runs = max(rates.items(), key=value)
        row = {"method": name, "rate": rate, "seeds": len(runs)}
        row |= {key: _spread(x[key] for x in runs) for key in (*PARTS, "mia_auc")}
        row["terms"] = {
            key: _spread(x["terms"][key] for x in runs) for key in runs[0]["terms"]
        }
        row["below_floor"] = sum(x["below_floor"] for x in runs)
        row["finite"] = all(x.get("finite", True) for x in runs)
        found.append(row)

    def place(row):
        if row["method"] in REFERENCES:
            return 1, REFERENCES.index(row["method"])
        return 0, bool(row["below_floor"]), -row["final"][0]

    return sorted(found, key=place)


def _spread(values) -> list[float]:
    return intervals.spread(list(values), ddof=0)


def readme(results: Mapping[str, Any]) -> list[str]:
    """The lines of README.md."""
    about, lines = results["small"]["about"], results["small"]["lines"]
    rows, counts, facts = summarise(lines), about["questions"], about["facts"]
    original, nothing = (
        next(row for row in rows if row["method"] == name)
        for name in ("original", "collapsed")
    )
    seeds = max(row["seeds"] for row in rows)
    memorised = [
        1 - original["terms"][f"forget {task} sc"][0]
        for task in ("Task1", "Task2", "Task3")
    ]
    tried = [row for row in rows if row["method"] not in REFERENCES]
    useful = [
        row["method"]
        for row in tried
        if not row["below_floor"] and row["task_aggregate"][0] > 0
    ]
    best = tried[0]
    return [
        *page.head(
            "SemEval-2025 Task 4 (LUME)",
            claim="Methods that change all weights forget LUME's documents and retain "
            "the rest, by the official score of the task ("
            "[arXiv 2504.02883](https://arxiv.org/abs/2504.02883); Cyber for AI: "
            "[arXiv 2503.04795](https://arxiv.org/abs/2503.04795)).",
            command="python -m experiments.semeval.run",
            time=page.spent(lines),
            setup=f"A decoder of {about['parameters'] / 1e6:.2f}M parameters memorised "
            f"{counts['forget']} rows of LUME to forget and {counts['retain']} to "
            f"retain ({facts['documents']} documents of each task in each, inputs of "
            f"completions cut to {facts['words']} words) and {counts['other']} "
            f"questions of MMLU; {counts['holdout']} documents that no model saw are "
            f"compared with the forgotten ones. World `{about['world']}`; "
            f"{about['steps']} steps of {about['batch_size']} rows of each stream, "
            f"{seeds} seed{'s' if seeds > 1 else ''}, rates "
            f"{page.numbers(about['rates'])} on the first. Before unlearning, ROUGE-L "
            "recall of the completions to forget is "
            f"{', '.join(f'{x:.2f}' for x in memorised)} in the three tasks. "
            "*In turns, 1 and 1*: a step of ascent, then a step of NLL on the rows to "
            "retain, again and again. *In sequence, a third ascent*: the first third "
            "of the steps is ascent, the rest NLL.",
            verdict=[
                f"The best method is {best['method']} with a final score of "
                f"{page.pm(best['final'])} (mean ± standard deviation over "
                f"{best['seeds']} seed{'s' if best['seeds'] > 1 else ''}).",
                "Methods that differ from a collapsed model (above the floor on every "
                "seed, and a task aggregate above 0): "
                f"{', '.join(useful) if useful else 'none'}.",
                f"A model whose logits are all 0 has {nothing['final'][0]:.3f} of the "
                f"final score ({nothing['task_aggregate'][0]:.3f}, "
                f"{nothing['mia_score'][0]:.3f}, {nothing['mmlu'][0]:.3f}), so read "
                "the parts before the mean.",
            ],
        ),
        "![The three parts of the score](results/small.png)",
        "",
        "The final score is the mean of the three parts. A model below the floor, "
        "three quarters of MMLU before unlearning, is not ranked. MMLU's questions "
        "were memorised, as a decoder of this size knows none.",
        "",
        *page.table(
            [
                "method",
                "rate",
                "seeds",
                "final",
                "task aggregate",
                "MIA",
                "MMLU",
                "ranked",
            ],
            [
                [
                    (
                        f"**{row['method']}**"
                        if row["method"] in REFERENCES
                        else row["method"]
                    )
                    + ("" if row["finite"] else " (stopped: not finite)"),
                    page.rate(row["rate"]),
                    row["seeds"],
                    *(page.pm(row[key]) for key in PARTS),
                    f"{row['seeds'] - row['below_floor']} of {row['seeds']}",
                ]
                for row in rows
            ],
        ),
        "## The twelve terms",
        "",
        "ROUGE-L recall of completions (sc) and exact match of answers (qa); for the "
        "forget file one minus it. Means over seeds.",
        "",
        *page.table(
            ["method", *rows[0]["terms"], "AUC"],
            [
                [
                    row["method"],
                    *(f"{x[0]:.2f}" for x in row["terms"].values()),
                    f"{row['mia_auc'][0]:.2f}",
                ]
                for row in rows
            ],
        ),
        *page.versions(about),
    ]


def draw(content: Mapping[str, Any], file: Path) -> None:
    """The final score and its parts for every method."""
    rows = summarise(content["lines"])
    with plot.saved(file, size=(10, 4.6)) as (_, grid):
        labels = [row["method"] for row in rows]
        series = {k.replace("_", " "): [row[k] for row in rows] for k in PARTS}
        plot.bars(grid[0, 0], labels, series)
        grid[0, 0].legend(fontsize=8)


PLOTS, SUMMARIES = {"small": draw}, {"small": summarise}

if __name__ == "__main__":
    command.main(lambda found: page.redraw(FOLDER, readme, PLOTS), __doc__)
