# SPDX-License-Identifier: Apache-2.0
"""PNG figures of a report; each function gives None where there is nothing to draw."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.workflows.report import read

WORST = 1e-30  # smaller p-values are drawn here
COLOURS = ("#0b57d0", "#b3261e", "#e37400", "#7b1fa2", "#00838f", "#c2185b", "#5d4037")
OF_ROLE = {"original": "#5f6368", "retrained": "#188038"}
MARKERS = {"original": "s", "retrained": "*", "unlearned": "o"}
SHOWN = ("loss", "nll", "cosine", "grad_norm")  # of a training log, in this order
PANELS = 6
ACROSS = (
    (("overall", "model_utility"), "model utility"),
    (("retain", "probability"), "probability of rows to keep"),
)
UP = (
    (("overall", "forget_quality"), "forget quality (p-value, log scale)"),
    (("forget", "probability"), "probability of answers to forget"),
)


class Figure(NamedTuple):
    """A drawn figure: its file and what it shows."""

    file: Path
    caption: str


def colours(runs: Sequence[read.Run]) -> dict[str, str]:
    """Model -> colour, the same in all figures."""
    found, number = {}, 0
    for run in runs:
        found[run.name] = OF_ROLE.get(run.role)
        if run.role == "unlearned" or run.role in [
            r.role for r in runs[: runs.index(run)]
        ]:
            found[run.name] = COLOURS[number % len(COLOURS)]
            number += 1
    return found


def trade_off(runs: Sequence[read.Run], file: Path) -> Figure | None:
    """Forgetting against utility, one point a model, a panel each way to measure them.

    Across: the model's utility, and the probability of rows to keep. Up: forget
    quality, and the probability of answers to forget.
    """
    across, up = (
        [(key, label) for key, label in axes if _measured(runs, key)]
        for axes in (ACROSS, UP)
    )
    panels = [(x, y) for x in across for y in up]
    if not panels:
        return None
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(
        len(across),
        len(up),
        figsize=(5.4 * len(up), 3.7 * len(across) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    named = colours(runs)
    for axes, (x, y) in zip(grid.flat, panels, strict=True):
        _points(axes, runs, x[0], y[0], named)
        axes.set_xlabel(x[1])
        axes.set_ylabel(y[1])
        axes.grid(alpha=0.25)
    _legend(figure, grid)
    caption = "Forgetting against utility; bars are 95 % intervals."
    if up[0] == UP[0]:
        caption += " The dotted line is p = 0.05; above it forgetting is good."
    caption += " The line through the star is the retrained model."
    return _saved(pyplot, figure, file, caption)


def _points(axes, runs, across, up, named) -> None:
    log = up == UP[0][0]
    for run in runs:
        x, y = (read.numbers(run, task).get(name) for task, name in (across, up))
        if not x or not y or None in (x["value"], y["value"]):
            continue
        height = max(y["value"], WORST) if log else y["value"]
        axes.errorbar(
            x["value"],
            height,
            xerr=_bars(x),
            yerr=None if log else _bars(y),
            color=named[run.name],
            marker=MARKERS[run.role],
            markersize=13 if run.role == "retrained" else 8,
            linestyle="",
            elinewidth=1,
            label=run.name,
        )
        if run.role == "retrained":
            axes.axhline(height, color=named[run.name], linewidth=0.8, alpha=0.5)
    if log:
        axes.set_yscale("log")
        axes.axhline(0.05, color="#5f6368", linestyle=":", linewidth=1)


def training(runs: Sequence[read.Run], file: Path) -> Figure | None:
    """What the logs of training say, a panel a quantity, a line a model."""
    logged = {run.name: _named(run) for run in runs if len(run.training) > 1}
    keys = list(dict.fromkeys(k for log in logged.values() for x in log for k in x))
    keys = [key for end in SHOWN for key in keys if key.split("/")[-1] == end][:PANELS]
    if not keys:
        return None
    pyplot = _pyplot()
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(4.2 * columns, 3 * lines + 0.3),
        squeeze=False,
        layout="constrained",
    )
    named = colours(runs)
    for axes, key in zip(grid.flat, keys, strict=False):
        for name, log in logged.items():
            pairs = [(x["step"], x[key]) for x in log if key in x]
            if not pairs:
                continue
            steps, heights = zip(*pairs, strict=True)
            heights = [math.nan if y is None else y for y in heights]
            axes.plot(steps, heights, color=named[name], label=name)
        axes.set_title(key, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    _legend(figure, grid)
    caption = "Training: the losses, norms and cosines that were logged."
    return _saved(pyplot, figure, file, caption)


def attack(name: str, found: Mapping[str, Any], file: Path) -> Figure | None:
    """Curves of one attack."""
    if not found.get("curves"):
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")
    values = found["x"]["values"]
    plain = all(isinstance(x, int | float) for x in values)
    places = values if plain else range(len(values))
    for i, (label, curve) in enumerate(found["curves"].items()):
        heights = [math.nan if y is None else y for y in curve]
        own = OF_ROLE.get(label, COLOURS[i % len(COLOURS)])
        axes.plot(places, heights, marker="o", markersize=4, color=own, label=label)
    if not plain:
        axes.set_xticks(list(places), [str(x) for x in values], fontsize=8)
    if found.get("chance") is not None:
        axes.axhline(found["chance"], color="#5f6368", linestyle=":", label="chance")
    axes.set_xlabel(found["x"].get("label", ""))
    axes.set_ylabel(found["measure"])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return _saved(pyplot, figure, file, str(found.get("attack", name)))


def _named(run) -> list[dict[str, Any]]:
    """A log's entries; "total/forget/loss", a part of a joint term, is forget/loss."""

    def name(key: str) -> str:
        return key.removeprefix("total/") if key.count("/") > 1 else key

    return [{name(key): x for key, x in entry.items()} for entry in run.training]


def _measured(runs, key) -> bool:
    return any(read.value(run, *key) is not None for run in runs)


def _bars(number):
    if number.get("low") is None:
        return None
    middle = number["value"]
    return [[max(0.0, middle - number["low"])], [max(0.0, number["high"] - middle)]]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _legend(figure, grid) -> None:
    """One for all panels, above them."""
    pairs = [axes.get_legend_handles_labels() for axes in grid.flat]
    named = {
        label: handle
        for handles, labels in sorted(pairs, key=lambda pair: -len(pair[1]))
        for handle, label in zip(handles, labels, strict=True)
    }
    figure.legend(
        named.values(),
        named,
        loc="outside upper left",
        ncols=min(len(named), 6),
        fontsize=9,
        frameon=False,
    )


def _saved(pyplot, figure, file: Path, caption: str) -> Figure:
    # No version in the file: the same numbers give the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return Figure(file, caption)
