# SPDX-License-Identifier: Apache-2.0
"""The page and the plots of both experiments on hypergradients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plot as plots
from experiments.shared.intervals import spread
from experiments.shared.page import Content, head, pm, seeds, table

Line = Mapping[str, Any]
SCORES = ("forget_probability", "retain_probability", "upper")
RUNS = {
    "learnt": "**learned by f2sa**",
    "grid": "grid, equal weights",
    "clean": "grid, wrong rows left out",
}
DRAW = {"--draw": dict(action="store_true", help="only draw page and plots again")}


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """[mean, deviation] over seeds of every run at every gamma, and of the best gamma.

    The best gamma of a grid is chosen for each seed on the test rows themselves, so it
    is a bound that no user could reach.
    """
    found = []
    for name in RUNS:
        runs = [line for line in lines if line["run"] == name]
        groups = {"learned": runs}
        if name != "learnt":
            gammas = dict.fromkeys(line["gamma"] for line in runs)
            groups = {f"{g:g}": [x for x in runs if x["gamma"] == g] for g in gammas}
            groups["best"] = [
                min((x for x in runs if x["seed"] == seed), key=lambda x: x["upper"])
                for seed in dict.fromkeys(line["seed"] for line in runs)
            ]
        for gamma, group in groups.items():
            row = {"run": name, "gamma": gamma, "seeds": len(group)}
            for score in SCORES:
                row[score] = spread([line[score] for line in group], ddof=0)
            found.append(row)
    return found


def separation(line: Line) -> float:
    """The chance that a right row outweighs a wrong one (area under the ROC curve)."""
    weights, wrong = np.array(line["weights"]), np.array(line["wrong"])
    right, bad = weights[~wrong][:, None], weights[wrong]
    return float(np.mean((right > bad) + 0.5 * (right == bad)))


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md, of {"weigh", "error"}."""
    lines = head(
        "Learning unlearning's weights by a hypergradient",
        claim="A hypergradient can learn how strongly to forget, and which retain rows "
        "to trust, with first derivatives alone "
        "(F2SA, [2301.10945](https://arxiv.org/abs/2301.10945)). Experimental.",
        command="\n".join(
            f"python -m experiments.bilevel.{name}" for name in ("weigh", "error")
        ),
        time="`error` takes a few seconds; the time of `weigh` was not recorded.",
        setup="`weigh`: the small world; a third of the retain rows have a wrong "
        "answer. `error`: weighted ridge regression, where the hypergradient is known.",
        verdict=[
            *(_verdict(results["weigh"]) if "weigh" in results else ()),
            *(_error_verdict(results["error"]) if "error" in results else ()),
        ],
    )
    if "weigh" in results:
        lines += _weigh(results["weigh"])
    if "error" in results:
        lines += _error(results["error"])
    return lines


def _verdict(content: Content) -> list[str]:
    rows = summarise(content["runs"])
    upper = {r["run"]: r["upper"] for r in rows if r["gamma"] in ("learned", "best")}
    learned, grid, clean = (upper[name] for name in RUNS)
    runs = [line for line in content["runs"] if line["run"] == "learnt"]
    weights = [line["updates"][-1]["wrong_weight"] for line in runs]
    right = sum(separation(line) > 0.7 for line in runs)
    beyond = abs(learned[0] - grid[0]) > max(learned[1], grid[1])
    word = "differs from" if beyond else "is within one deviation of"
    return [
        f"The learned settings give an upper level of {pm(learned)} (lower is better), "
        f"which {word} the best gamma of the grid with equal weights, {pm(grid)}: "
        f"{'decided' if beyond else '**undecided**'} on {len(runs)} seeds. The grid "
        f"without the wrong rows, which no user knows, reaches {pm(clean)}.",
        f"The weights separated wrong rows from right ones on {right} of {len(runs)} "
        f"seeds (weight on wrong rows {', '.join(f'{x:.2f}' for x in weights)}; 0.33 "
        "at first).",
    ]


def _error_verdict(content: Content) -> list[str]:
    return [
        "The error falls as 1 / strength: the slope of log error over log strength "
        f"from 1e2 to 1e6 in float64 is {content['slope_1e2_to_1e6']:.3f} (-1 in "
        "theory): **holds** on this problem. In float32 rounding takes over above 1e4."
    ]


def _weigh(content: Content) -> list[str]:
    about, runs = content["about"], content["runs"]
    learned = [line for line in runs if line["run"] == "learnt"]
    return [
        "## Learning gamma and the weights of retain rows",
        "",
        f"World `{about['world']}`, {about['forget']} rows to forget, "
        f"{about['retain']} to retain, of which every third is wrong, "
        f"{seeds(about['seeds'])}. Means ± standard deviation on rows that nothing was "
        "trained or tuned on. Upper level: forget + 1 - retain; lower is better. A "
        "grid's *best* gamma is chosen on those very rows, so it is a bound that no "
        "user could reach.",
        "",
        "![Scores and learned settings](results/weigh.png)",
        "",
        *table(
            ["run", "gamma", "forget probability", "retain probability", "upper level"],
            [
                (RUNS[row["run"]], row["gamma"], *(pm(row[s]) for s in SCORES))
                for row in summarise(runs)
            ],
        ),
        *table(
            [
                "seed",
                "gamma learned",
                "weight on wrong rows (of 1; 0.33 at first)",
                "chance that a right row outweighs a wrong one",
            ],
            [
                (
                    line["seed"],
                    f"{line['gamma']:.3g}",
                    f"{line['updates'][-1]['wrong_weight']:.3f}",
                    f"{separation(line):.2f}",
                )
                for line in learned
            ],
        ),
    ]


def _error(content: Content) -> list[str]:
    errors = content["relative_errors"]
    return [
        "## The error of the penalty hypergradient",
        "",
        "Weighted ridge regression, inner problems solved exactly: "
        f"|dx - exact| / |exact|. jax {content['jax']}.",
        "",
        "![Error against strength](results/error.png)",
        "",
        *table(
            ["strength", *errors],
            [
                (f"{strength:.0e}", *(f"{x:.1e}" for x in each))
                for strength, *each in zip(
                    content["strengths"], *errors.values(), strict=True
                )
            ],
        ),
    ]


def draw_weigh(content: Content, file: Path) -> None:
    """Left: the upper level over gamma. Right: gamma and weights while learning."""
    lines = content["runs"]
    learned = [line for line in lines if line["run"] == "learnt"]
    with plots.saved(file, size=(12, 5), columns=2) as (_, grid):
        left, right = grid[0]
        looks = {"grid": ("o", 30), "clean": ("^", 30), "learnt": ("*", 140)}
        for name, (marker, area) in looks.items():
            runs = [line for line in lines if line["run"] == name]
            left.scatter(
                [line["gamma"] for line in runs],
                [line["upper"] for line in runs],
                marker=marker,
                s=area,
                label=RUNS[name].strip("*"),
            )
        left.set_xscale("log")
        left.set_xlabel("gamma")
        left.set_ylabel("upper level on test rows (lower is better)")
        left.legend()
        weights = right.twinx()
        for line in learned:
            steps = range(1, len(line["updates"]) + 1)
            right.plot(steps, [x["gamma"] for x in line["updates"]], color="C0")
            wrong = [x["wrong_weight"] for x in line["updates"]]
            weights.plot(steps, wrong, color="C3", linestyle="--")
        right.set_yscale("log")
        right.set_xlabel("update of the upper level")
        right.set_ylabel("gamma (solid)", color="C0")
        weights.set_ylabel("weight on wrong rows (dashed)", color="C3")
        weights.set_ylim(0, None)
        for axes in (left, right):
            axes.grid(alpha=0.3)


def draw_error(content: Content, file: Path) -> None:
    """Relative error over the strength of the penalty."""
    strengths, errors = content["strengths"], content["relative_errors"]
    with plots.saved(file, size=(7, 5)) as (_, grid):
        axes = grid[0, 0]
        for name, values in errors.items():
            axes.loglog(strengths, values, marker="o", label=name)
        guide = [errors["float64"][2] * strengths[2] / s for s in strengths]
        axes.loglog(strengths, guide, color="grey", linestyle=":", label="1 / strength")
        axes.set_xlabel("strength of the penalty")
        axes.set_ylabel("relative error of the hypergradient")
        axes.grid(alpha=0.3)
        axes.legend()


PLOTS = {"weigh": draw_weigh, "error": draw_error}
