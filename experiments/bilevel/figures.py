# SPDX-License-Identifier: Apache-2.0
"""Table and plot of experiments.bilevel.weigh, from its lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.io import log

Line = Mapping[str, Any]
SCORES = ("forget_probability", "retain_probability", "upper")


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with the table, `place`.png."""
    rows = summarise(lines)
    whole = {"about": about, "summary": rows, "runs": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = _markdown(lines, about, rows, place.name)
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(lines, place.with_suffix(".png"))


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every run at every gamma, and of each
    grid's best gamma, which the seed's own test rows chose: a grid's upper bound."""
    found = []
    for run in ("learnt", "grid", "clean"):
        own = [line for line in lines if line["run"] == run]
        if run != "learnt":
            best = [
                min((x for x in own if x["seed"] == seed), key=lambda x: x["upper"])
                for seed in dict.fromkeys(line["seed"] for line in own)
            ]
            gammas = dict.fromkeys(line["gamma"] for line in own)
            groups = {f"{g:g}": [x for x in own if x["gamma"] == g] for g in gammas}
            groups["its best"] = best
        else:
            groups = {"learnt": own}
        for gamma, group in groups.items():
            row = {"run": run, "gamma": gamma, "seeds": len(group)}
            for name in SCORES:
                values = [line[name] for line in group]
                row[name] = [float(np.mean(values)), float(np.std(values))]
            found.append(row)
    return found


def found_wrong(line: Line) -> float:
    """How well the learnt weights tell wrong rows from right ones: the chance that a
    right row outweighs a wrong one (the area under the ROC curve)."""
    weights, wrong = np.array(line["weights"]), np.array(line["wrong"])
    right, bad = weights[~wrong][:, None], weights[wrong]
    return float(np.mean((right > bad) + 0.5 * (right == bad)))


def _markdown(lines, about, rows, name):
    words = {
        "learnt": "**learnt by f2sa**",
        "grid": "grid, equal weights",
        "clean": "grid, wrong rows left out",
    }
    text = [
        "# Learning gamma and the weights of retain rows",
        "",
        "Written by `python -m experiments.bilevel.weigh` (see there for the problem). "
        f"World `{about['world']}`, {about['forget']} rows to forget, "
        f"{about['retain']} to keep of which every third is wrong, "
        f"{len(about['seeds'])} seeds; mean ± standard deviation on rows that nothing "
        "was trained or tuned on. Upper level: forget + 1 - retain, lower is better. "
        "A grid's best gamma is picked on those very rows, so it is a bound that a "
        "user could not reach.",
        "",
        f"![Scores and what was learnt]({name}.png)",
        "",
        "| run | gamma | forget probability | retain probability | upper level |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        scores = [f"{row[s][0]:.3f} ± {row[s][1]:.3f}" for s in SCORES]
        text.append(f"| {words[row['run']]} | {row['gamma']} | {' | '.join(scores)} |")
    text += [
        "",
        "| seed | gamma learnt | weight on wrong rows (of 1; 0.33 at first) | "
        "right row outweighs wrong row |",
        "| --- | --- | --- | --- |",
    ]
    for line in lines:
        if line["run"] == "learnt":
            weight = line["updates"][-1]["wrong_weight"]
            text.append(
                f"| {line['seed']} | {line['gamma']:.3g} | {weight:.3f} | "
                f"{found_wrong(line):.2f} |"
            )
    return "\n".join(text) + "\n"


def _plot(lines, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    looks = {
        "grid": ("o", "grid, equal weights"),
        "clean": ("^", "grid, wrong rows left out"),
        "learnt": ("*", "learnt by f2sa"),
    }
    for colour, (run, (marker, label)) in enumerate(looks.items()):
        own = [line for line in lines if line["run"] == run]
        left.scatter(
            [line["gamma"] for line in own],
            [line["upper"] for line in own],
            marker=marker,
            s=140 if run == "learnt" else 30,
            color=f"C{colour}",
            label=label,
        )
    left.set_xscale("log")
    left.set_xlabel("gamma")
    left.set_ylabel("upper level on test rows (lower is better)")
    left.legend()
    twin = right.twinx()
    for line in lines:
        if line["run"] == "learnt":
            steps = range(1, len(line["updates"]) + 1)
            gammas = [entry["gamma"] for entry in line["updates"]]
            weights = [entry["wrong_weight"] for entry in line["updates"]]
            right.plot(steps, gammas, color="C0")
            twin.plot(steps, weights, color="C3", linestyle="--")
    right.set_yscale("log")
    right.set_xlabel("update of the upper level")
    right.set_ylabel("gamma (solid)", color="C0")
    twin.set_ylabel("weight on wrong rows (dashed)", color="C3")
    twin.set_ylim(0, None)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
