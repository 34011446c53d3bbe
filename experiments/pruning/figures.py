# SPDX-License-Identifier: Apache-2.0
"""The page and the plot of selective pruning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.shared import plot as plots
from experiments.shared.page import Content, head, table, versions

Line = Mapping[str, Any]
SIDES = ("code", "prose")
LIMITS = (300.0, 10.0)  # seconds: statistics of one text; from statistics to a mask


def other(side: str) -> str:
    """The side that is retained when this one is forgotten."""
    return SIDES[1 - SIDES.index(side)]


def drops(lines: Sequence[Line], forget: str) -> list[dict[str, Any]]:
    """What every step in one direction loses on both sides.

    Returns:
        Dicts of `method`, `seed`, `step`, `forget`, `retain` (fractions of the accuracy
        before pruning) and `ratio`, the first over the second; infinite if the accuracy
        on the retained text did not fall.
    """
    before, retain, found = lines[0], other(forget), []
    for line in lines[1:]:
        if line["forget"] not in (forget, ""):
            continue
        lost = {side: 1 - line[side] / (before[side] or 1) for side in SIDES}
        ratio = lost[forget] / lost[retain] if lost[retain] > 0 else float("inf")
        row = {key: line[key] for key in ("method", "seed", "step", "removed")}
        row |= {"forget": lost[forget], "retain": lost[retain], "ratio": ratio}
        found.append(row)
    return found


def best(lines: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """By direction, each method's step of the largest forget drop minus retain drop."""
    found = {}
    for side in SIDES:
        runs: dict[Any, dict[str, Any]] = {}
        for row in drops(lines, side):
            name = (row["method"], row["seed"])
            if name not in runs or _gap(row) > _gap(runs[name]):
                runs[name] = row
        found[side] = list(runs.values())
    return found


def _gap(row) -> float:
    return row["forget"] - row["retain"]


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md."""
    content = results["smollm2"]
    about, lines = content["about"], content["runs"]
    config, before = about["config"], lines[0]
    layers, units = about["neurons"]
    found = head(
        "Selective pruning",
        claim="Removing the MLP neurons that are most active on one text, relative to "
        "another, hurts the first text more than the second "
        "([2403.01267](https://arxiv.org/abs/2403.01267)).",
        command=about["command"],
        time="About 15 minutes on two cores.",
        setup=f"Model `{config['model']}`, {layers} layers of {units} MLP neurons; "
        f"every step removes {config['fraction']:.0%} of all of them. Code: "
        f"{about['texts']['code']}. Prose: {about['texts']['prose']}. Statistics over "
        f"{config['first_tokens']} tokens of each text before the first step and "
        f"{config['later_tokens']} before every later one. Top-1 accuracy of the next "
        f"token over {config['scored_tokens']} other tokens of each, in rows of "
        f"{config['length']}. Before pruning: code {before['code']:.3f}, prose "
        f"{before['prose']:.3f}. One model, one pair of texts, one seed.",
        verdict=[_verdict(lines, side) for side in SIDES],
    )
    found += [
        "![Drops on both texts](results/smollm2.png)",
        "",
        "A *drop* is the fraction of the accuracy before pruning that is lost; the "
        "*ratio* is the drop of the forgotten text over that of the retained text. "
        "Random and magnitude pruning read no text: their numbers are one run, read in "
        "both directions.",
        "",
    ]
    for side in SIDES:
        found += [f"## Forget {side}, retain {other(side)}", ""]
        found += ["The step where the two drops are furthest apart:", ""]
        found += table(
            ["method", "removed", f"drop of {side}", f"drop of {other(side)}", "ratio"],
            [
                (_name(row), f"{row['removed']:.0%}", *_cells(row))
                for row in best(lines)[side]
            ],
        )
        found += _steps(lines, side)
    return [*found, *_times(lines, about), "", *versions(about)]


def _verdict(lines, side) -> str:
    rows = {_name(row): row for row in best(lines)[side]}
    selective = rows.pop("selective")
    text = (
        f"Forget {side}: at {selective['removed']:.0%} removed, selective pruning "
        f"loses {selective['forget']:.0%} of the accuracy on {side} and "
        f"{selective['retain']:.0%} of that on {other(side)}"
    )
    wider = all(_gap(selective) > _gap(row) for row in rows.values())
    names = " and ".join(rows)
    if wider:
        return f"{text}. The two drops are further apart than for {names}: **holds**."
    return f"{text}. The two drops are not further apart than for {names}: **fails**."


def _cells(row) -> list[str]:
    return [f"{row['forget']:.1%}", f"{row['retain']:.1%}", _ratio(row["ratio"])]


def _steps(lines, side) -> list[str]:
    rows = drops(lines, side)
    runs = list(dict.fromkeys(map(_name, rows)))
    body = []
    for step in dict.fromkeys(row["step"] for row in rows):
        here = {_name(row): row for row in rows if row["step"] == step}
        removed = next(iter(here.values()))["removed"]
        cells = [
            "{} / {} ({})".format(*_cells(here[x])) if x in here else "" for x in runs
        ]
        body.append([f"{removed:.0%}", *cells])
    title = f"Drop of {side} / drop of {other(side)} (ratio), step by step:"
    return [title, "", *table(["removed", *runs], body)]


def _times(lines, about) -> list[str]:
    config, check = about["config"], about["checks"]
    selective = [line for line in lines[1:] if line["forget"]]
    found = ["## Time and exactness", ""]
    if selective:
        first = selective[0]
        each = [
            f"{first[f'statistics_tokens_{side}']} tokens of {side} took "
            f"{first[f'statistics_seconds_{side}']:.0f} s "
            f"({first[f'statistics_core_seconds_{side}']:.0f} s of one core)"
            for side in SIDES
        ]
        found.append(
            f"- Statistics over {' and over '.join(each)}, compilation and other work "
            f"on the machine included. The limit is {LIMITS[0]:.0f} s on two cores. "
            f"Later steps use {config['later_tokens']} tokens of each."
        )
        chosen = max(line["choose_core_seconds"] for line in selective)
        found.append(
            "- From statistics to a mask (scoring and selection): at most "
            f"{chosen:.2f} s of one core. The limit is {LIMITS[1]:.0f} s."
        )
    if check:
        found += [
            "- The logits of the pruned weights and of masked activations differ by at "
            f"most {check['gap']:.1e} of the largest logit.",
            "- With the neurons removed (`remove_units` with `pad`, because layers "
            "lose different numbers) the model has {check['width'][1]} of "
            f"{check['width'][0]} neurons a layer; a forward pass takes "
            f"{check['seconds'][1]:.2f} s, {check['seconds'][0]:.2f} s before.",
        ]
    return found


def _name(row) -> str:
    return f"random, seed {row['seed']}" if row["method"] == "random" else row["method"]


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 1000 else "no loss"


def draw(content: Content, file: Path) -> None:
    """Both drops of every method over the neurons removed, in both directions."""
    lines = content["runs"]
    with plots.saved(file, size=(11, 4.2), columns=2, sharey=True) as (_, grid):
        for axes, side in zip(grid[0], SIDES, strict=True):
            rows = drops(lines, side)
            for index, name in enumerate(dict.fromkeys(map(_name, rows))):
                run = [row for row in rows if _name(row) == name]
                removed = [0, *(row["removed"] for row in run)]
                for part, text, style in (
                    ("forget", side, "-o"),
                    ("retain", other(side), "--s"),
                ):
                    values = [0, *(row[part] for row in run)]
                    look = dict(color=f"C{min(index, 2)}", markersize=3)
                    axes.plot(removed, values, style, label=f"{name}: {text}", **look)
            axes.set_title(f"forget {side}, retain {other(side)}")
            axes.set_xlabel("fraction of MLP neurons removed")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        grid[0, 0].set_ylabel("relative drop of top-1 accuracy")
