# SPDX-License-Identifier: Apache-2.0
"""PNG figures of a report; a function returns None if there is nothing to draw."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxunlearn.workflows.report import read

MIN_PVALUE = 1e-30  # smaller p-values are drawn at this height
COLOURS = ("#0b57d0", "#b3261e", "#e37400", "#7b1fa2", "#00838f", "#c2185b", "#5d4037")
OF_ROLE = {"original": "#5f6368", "retrained": "#188038"}
MARKERS = {"original": "s", "retrained": "*", "unlearned": "o"}
LOGGED = ("loss", "nll", "cosine", "grad_norm")  # drawn from a log, in this order
MAX_PANELS = 6
ACROSS = (
    (("overall", "model_utility"), "model utility"),
    (("retain", "probability"), "probability of answers to retain"),
)
UP = (
    (("overall", "forget_quality"), "forget quality (p-value, log scale)"),
    (("forget", "probability"), "probability of answers to forget"),
)


class Figure(NamedTuple):
    """A figure: its file and its caption."""

    file: Path
    caption: str


def colours(models: Sequence[read.ModelResults]) -> dict[str, str]:
    """Model -> colour, the same in all figures."""
    found, number = {}, 0
    for model in models:
        found[model.name] = OF_ROLE.get(model.role)
        if model.role == "unlearned" or model.role in [
            r.role for r in models[: models.index(model)]
        ]:
            found[model.name] = COLOURS[number % len(COLOURS)]
            number += 1
    return found


def trade_off(models: Sequence[read.ModelResults], file: Path) -> Figure | None:
    """Forgetting against utility: one point for each model, one panel for each pair.

    Horizontal: model utility, and the probability of answers to retain. Vertical:
    forget quality, and the probability of answers to forget.
    """
    across, up = (
        [(key, label) for key, label in axes if _measured(models, key)]
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
    named = colours(models)
    for axes, (x, y) in zip(grid.flat, panels, strict=True):
        _points(axes, models, x[0], y[0], named)
        axes.set_xlabel(x[1])
        axes.set_ylabel(y[1])
        axes.grid(alpha=0.25)
    _legend(figure, grid)
    caption = "Forgetting against utility. Bars are 95 % intervals."
    if up[0] == UP[0]:
        caption += (
            " The dotted line is p = 0.05; above it, the truth ratios do not differ "
        )
        caption += "significantly from the retrained model's."
    if any(model.role == "retrained" for model in models):
        caption += " The horizontal line is at the retrained model."
    return _saved(pyplot, figure, file, caption)


def _points(axes, models, across, up, named) -> None:
    log = up == UP[0][0]
    for model in models:
        x, y = (read.numbers(model, task).get(name) for task, name in (across, up))
        if not x or not y or None in (x["value"], y["value"]):
            continue
        height = max(y["value"], MIN_PVALUE) if log else y["value"]
        axes.errorbar(
            x["value"],
            height,
            xerr=_bars(x),
            yerr=None if log else _bars(y),
            color=named[model.name],
            marker=MARKERS[model.role],
            markersize=13 if model.role == "retrained" else 8,
            linestyle="",
            elinewidth=1,
            label=model.name,
        )
        if model.role == "retrained":
            axes.axhline(height, color=named[model.name], linewidth=0.8, alpha=0.5)
    if log:
        axes.set_yscale("log")
        axes.axhline(0.05, color="#5f6368", linestyle=":", linewidth=1)


def training(models: Sequence[read.ModelResults], file: Path) -> Figure | None:
    """Logs of training: one panel for each quantity, one line for each model."""
    logged = {model.name: _named(model) for model in models if len(model.training) > 1}
    keys = list(dict.fromkeys(k for log in logged.values() for x in log for k in x))
    keys = [key for end in LOGGED for key in keys if key.split("/")[-1] == end]
    keys = keys[:MAX_PANELS]
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
    named = colours(models)
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
    caption = "Training: the logged losses, norms and cosines."
    return _saved(pyplot, figure, file, caption)


def attack(name: str, found: Mapping[str, Any], file: Path) -> Figure | None:
    """The curves of one attack."""
    if not found.get("curves"):
        return None
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")
    values = found["x"]["values"]
    plain = all(isinstance(x, int | float) for x in values)
    places = values if plain else range(len(values))
    for i, (label, curve) in enumerate(found["curves"].items()):
        heights = [math.nan if y is None else y for y in curve]
        colour = OF_ROLE.get(label, COLOURS[i % len(COLOURS)])
        axes.plot(places, heights, marker="o", markersize=4, color=colour, label=label)
    if not plain:
        axes.set_xticks(list(places), [str(x) for x in values], fontsize=8)
    if found.get("chance") is not None:
        axes.axhline(found["chance"], color="#5f6368", linestyle=":", label="chance")
    axes.set_xlabel(found["x"].get("label", ""))
    axes.set_ylabel(found["measure"])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return _saved(pyplot, figure, file, str(found.get("attack", name)))


def _named(model) -> list[dict[str, Any]]:
    """A log's entries. "total/forget/loss", a part of a joint term, becomes
    "forget/loss"."""

    def name(key: str) -> str:
        return key.removeprefix("total/") if key.count("/") > 1 else key

    return [{name(key): x for key, x in entry.items()} for entry in model.training]


def _measured(models, key) -> bool:
    return any(read.value(model, *key) is not None for model in models)


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
    """One legend above all panels."""
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
    # Without the version in the file, the same numbers give the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return Figure(file, caption)
