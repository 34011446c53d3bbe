# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of selective pruning, from its lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxunlearn.io import log

Line = Mapping[str, Any]

SIDES = ("code", "prose")
LIMITS = (300.0, 10.0)  # seconds: statistics of one text, and from them to a mask


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of prune.prune.
        about: head, command, versions and checks.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    found = {"about": about, "best": best(lines), "lines": list(lines)}
    text = json.dumps(log.plain(found), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(lines, about, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(lines, place.with_suffix(".png"))


def drops(lines: Sequence[Line], forget: str) -> list[dict[str, Any]]:
    """Of every step in one direction what is lost on both sides, relative to before.

    Returns:
        Dicts of `method`, `seed`, `step`, `forget`, `retain` (fractions of the accuracy
        before) and `ratio`, the first over the second; infinite where nothing is lost
        of what is kept, or it got better.
    """
    (keep,) = set(SIDES) - {forget}
    before, found = lines[0], []
    for line in lines[1:]:
        if line["forget"] not in (forget, ""):
            continue
        lost = {side: 1 - line[side] / (before[side] or 1) for side in SIDES}
        ratio = lost[forget] / lost[keep] if lost[keep] > 0 else float("inf")
        row = {key: line[key] for key in ("method", "seed", "step", "removed")}
        row |= {"forget": lost[forget], "retain": lost[keep], "ratio": ratio}
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


def _markdown(lines, about, name) -> list[str]:
    config, before = about["config"], lines[0]
    layers, units = about["neurons"]
    out = [
        "# Selective pruning: code against English",
        "",
        f"Written by `{about['command']}` (see there for what runs). Model "
        f"`{config['model']}`, {layers} layers of {units} MLP neurons, "
        f"{config['fraction']:.0%} of all of them a step. Code: "
        f"{about['texts']['code']}; prose: {about['texts']['prose']}. Statistics over "
        f"{config['first']} tokens of each text before the first step and "
        f"{config['again']} before every later one; top-1 accuracy of the next token "
        f"over {config['scored']} other tokens of each, in rows of {config['length']}. "
        f"Before: code {before['code']:.3f}, prose {before['prose']:.3f}.",
        "",
        f"![What is lost of both texts]({name}.png)",
        "",
        "A *drop* is the fraction of the accuracy before that is lost; the ratio is "
        "the drop of the text to forget over that of the text to keep. Random and "
        "magnitude pruning know no text: their lines are one run read both ways.",
        "",
    ]
    for side in SIDES:
        (keep,) = set(SIDES) - {side}
        out += [
            f"## Forget {side}, keep {keep}",
            "",
            "Where the two drops are furthest apart:",
            "",
            f"| method | removed | drop of {side} | drop of {keep} | ratio |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in best(lines)[side]:
            out.append(
                f"| {_name(row)} | {row['removed']:.0%} | {row['forget']:.1%} | "
                f"{row['retain']:.1%} | {_ratio(row['ratio'])} |"
            )
        out += ["", *_steps(lines, side), ""]
    return out + _times(lines, about)


def _steps(lines, side) -> list[str]:
    rows = drops(lines, side)
    runs = list(dict.fromkeys(map(_name, rows)))
    out = [
        "Drop of the one / of the other (ratio), step by step:",
        "",
        f"| removed | {' | '.join(runs)} |",
        "| --- |" + " --- |" * len(runs),
    ]
    for step in dict.fromkeys(row["step"] for row in rows):
        cells = {_name(row): row for row in rows if row["step"] == step}
        removed = next(iter(cells.values()))["removed"]
        texts = [
            f"{cells[run]['forget']:.1%} / {cells[run]['retain']:.1%} "
            f"({_ratio(cells[run]['ratio'])})"
            if run in cells
            else ""
            for run in runs
        ]
        out.append(f"| {removed:.0%} | {' | '.join(texts)} |")
    return out


def _times(lines, about) -> list[str]:
    first = [x for x in lines[1:] if x["step"] == 1 and x["forget"]]
    config = about["config"]
    out = ["## Time and exactness", ""]
    if first:
        texts = [
            f"{first[0][f'statistics_tokens_{side}']} tokens of {side} "
            f"{first[0][f'statistics_seconds_{side}']:.0f} s "
            f"({first[0][f'statistics_core_seconds_{side}']:.0f} s of one core)"
            for side in SIDES
        ]
        chosen = [x.get("choose_core_seconds") for x in lines[1:] if x["forget"]]
        chosen = [x for x in chosen if x is not None]
        out.append(
            f"- Statistics over {' and '.join(texts)}, compilation included and other "
            f"work on the machine; the bar is {LIMITS[0]:.0f} s on two cores. Before "
            f"later steps {config['again']} tokens of each."
        )
        if chosen:
            out.append(
                "- From statistics to a mask, scoring and selecting, at most "
                f"{max(chosen):.2f} s of one core; the bar is {LIMITS[1]:.0f} s."
            )
    check = about["checks"]
    if check:
        out += [
            "- Logits of the pruned weights differ from those of masked activations by "
            f"at most {check['gap']:.1e} of the largest logit.",
            "- Made smaller (`remove_units` with `pad`, as layers lose different "
            f"counts), the model has {check['width'][1]} of {check['width'][0]} "
            f"neurons a layer, and a forward pass takes {check['seconds'][1]:.2f} s "
            f"for {check['seconds'][0]:.2f} s.",
        ]
    return [
        *out,
        "",
        "Versions: "
        + ", ".join(f"{name} {x}" for name, x in about["versions"].items())
        + ".",
    ]


def _name(row) -> str:
    return f"random, seed {row['seed']}" if row["method"] == "random" else row["method"]


def _ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 1000 else "no loss"


def _plot(lines, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axes, side in zip(grid, SIDES, strict=True):
        (keep,) = set(SIDES) - {side}
        rows = drops(lines, side)
        names = list(dict.fromkeys(map(_name, rows)))
        for colour, name in zip(
            ("C0", "C1", *["C2"] * len(names)), names, strict=False
        ):
            own = [row for row in rows if _name(row) == name]
            removed = [0, *(row["removed"] for row in own)]
            for part, style in (("forget", "-o"), ("retain", "--s")):
                label = f"{name}: {side if part == 'forget' else keep}"
                values = [0, *(row[part] for row in own)]
                axes.plot(
                    removed, values, style, color=colour, label=label, markersize=3
                )
        axes.set_title(f"forget {side}, keep {keep}")
        axes.set_xlabel("fraction of MLP neurons removed")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    grid[0].set_ylabel("drop of top-1 accuracy, relative")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
