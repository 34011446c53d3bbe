# SPDX-License-Identifier: Apache-2.0
"""The leaderboard of SemEval-2025 Task 4 in the small world, from its lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.io import log

Line = Mapping[str, Any]

PARTS = ("final", "task_aggregate", "mia_score", "mmlu")
APART = ("untouched", "retrained", "collapsed")


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with the tables, `place`.png.

    Args:
        lines: of lume.run.
        about: head, questions, facts, parameters, command and versions.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines)
    whole = {"about": about, "summary": rows, "runs": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(rows, about, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(rows, place.with_suffix(".png"))


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For every method, at the rate that ran on most seeds or else the best of the
    sweep: each part, the AUC and the twelve terms, [mean, deviation over seeds]; those
    above the floor on every seed first, by final score."""
    found = []
    for name in dict.fromkeys(line["method"] for line in lines):
        rates: dict[Any, list[Line]] = {}
        for line in lines:
            if line["method"] == name:
                rates.setdefault(line.get("rate"), []).append(line)

        def value(item):
            rate, own = item
            ranked = not own[0]["below_floor"]
            measure = own[0]["final" if ranked else "mmlu"]
            return len(own), ranked, measure, -(rate or 0)

        rate, own = max(rates.items(), key=value)
        row = {"method": name, "rate": rate, "seeds": len(own)}
        row |= {key: _spread([x[key] for x in own]) for key in (*PARTS, "mia_auc")}
        terms = own[0]["terms"]
        row["terms"] = {key: _spread([x["terms"][key] for x in own]) for key in terms}
        row["below_floor"] = sum(x["below_floor"] for x in own)
        row["finite"] = all(x.get("finite", True) for x in own)
        found.append(row)
    return sorted(
        found,
        key=lambda row: (
            row["method"] not in APART,
            -APART.index(row["method"]) if row["method"] in APART else 0,
            not row["below_floor"],
            row["final"][0],
        ),
        reverse=True,
    )


def _spread(values):
    return [float(np.mean(values)), float(np.std(values))]


def _markdown(rows, about, name) -> list[str]:
    counts, facts = about["questions"], about["facts"]
    (whole,) = [row for row in rows if row["method"] == "untouched"]
    (nothing,) = [row for row in rows if row["method"] == "collapsed"]
    seeds = max(row["seeds"] for row in rows)
    memorised = [
        1 - whole["terms"][f"forget {task} sc"][0]
        for task in ("Task1", "Task2", "Task3")
    ]
    out = [
        "# SemEval-2025 Task 4 in the small world",
        "",
        f"Written by `{about['command']}` (see there for what runs). A decoder of "
        f"{about['parameters'] / 1e6:.2f}M parameters memorised {counts['forget']} "
        f"rows of LUME to forget and {counts['retain']} to keep "
        f"({facts['documents']} documents of each task in each, inputs of completions "
        f"cut to {facts['words']} words) and {counts['other']} questions of MMLU; "
        f"{counts['holdout']} documents that nobody saw stand against the forgotten "
        f"ones. World `{about['world']}`; {about['steps']} steps of {about['rows']} "
        f"rows of each stream, {seeds} seed{'s' if seeds > 1 else ''}, rates "
        f"{', '.join(f'{r:g}' for r in about['rates'])} on the first. Before "
        "unlearning, ROUGE-L recall of the completions to forget is "
        f"{', '.join(f'{x:.2f}' for x in memorised)} in the three tasks.",
        "",
        "The final score is the mean of the three parts. A model whose every logit is "
        f"0 has {nothing['final'][0]:.3f} of it ({nothing['task_aggregate'][0]:.3f}, "
        f"{nothing['mia_score'][0]:.3f}, {nothing['mmlu'][0]:.3f}): read the parts "
        "first. Below the floor, three quarters of MMLU before, a model is not ranked. "
        "MMLU's questions were memorised, as a decoder of this size knows none.",
        "",
        f"![The three parts of the score]({name}.png)",
        "",
        "| method | rate | seeds | final | task aggregate | MIA | MMLU | ranked |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row[key][0]:.3f} ± {row[key][1]:.3f}" for key in PARTS]
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        ranked = f"{row['seeds'] - row['below_floor']} of {row['seeds']}"
        title = f"**{row['method']}**" if row["method"] in APART else row["method"]
        mark = "" if row["finite"] else " (ended early: not finite)"
        out.append(
            f"| {title}{mark} | {rate} | {row['seeds']} | {' | '.join(cells)} | "
            f"{ranked} |"
        )
    ours = [row for row in rows if row["method"] not in APART]
    higher = [
        row["method"]
        for row in ours
        if not row["below_floor"] and row["task_aggregate"][0] > 0
    ]
    out += [
        "",
        "Not a collapsed model (above the floor on every seed, and a task aggregate "
        f"above 0): {', '.join(higher) if higher else 'none'}.",
        "",
        "## The twelve terms",
        "",
        "ROUGE-L recall of completions (sc) and exact match of answers (qa); of the "
        "forget file one minus it. Mean over seeds.",
        "",
        f"| method | {' | '.join(rows[0]['terms'])} | AUC |",
        "| --- |" + " --- |" * (len(rows[0]["terms"]) + 1),
    ]
    for row in rows:
        cells = [f"{x[0]:.2f}" for x in row["terms"].values()]
        out.append(
            f"| {row['method']} | {' | '.join(cells)} | {row['mia_auc'][0]:.2f} |"
        )
    versions = ", ".join(f"{key} {x}" for key, x in about["versions"].items())
    return [*out, "", f"Versions: {versions}."]


def _plot(rows, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.6))
    places, width = np.arange(len(rows)), 0.2
    for index, key in enumerate(PARTS):
        mean, spread = np.transpose([row[key] for row in rows])
        axes.bar(
            places + (index - 1.5) * width,
            mean,
            width,
            yerr=spread,
            label=key.replace("_", " "),
            capsize=2,
        )
    axes.set_xticks(
        places, [row["method"] for row in rows], rotation=25, ha="right", fontsize=8
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
