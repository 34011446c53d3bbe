# SPDX-License-Identifier: Apache-2.0
"""Bars and curves with their spreads, saved as PNG files."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def saved(
    file: Path,
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    dpi: int = 120,
    **more: Any,
) -> Iterator[tuple[Any, np.ndarray]]:
    """(figure, grid of axes [rows, columns]), which is saved and closed at the end.

    Args:
        file: PNG.
        size: in inches.
        rows, columns: of axes.
        dpi: dots an inch.
        more: for pyplot.subplots, such as sharey.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **more
    )
    try:
        yield figure, grid
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=dpi)
    finally:
        pyplot.close(figure)


def bars(
    axis: Any,
    labels: Sequence[str],
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    colours: Sequence[str] | None = None,
    rotation: float = 25,
) -> None:
    """Groups of bars with error bars.

    Args:
        axis: of matplotlib.
        labels: one a group.
        series: name in the legend -> for every group [mean, deviation] or
            [value, low, high].
        colours: one a series.
        rotation: of the labels, degrees.
    """
    places, width = np.arange(len(labels)), 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * width
        axis.bar(
            places + shift,
            [value[0] for value in values],
            width,
            yerr=_errors(values),
            label=name,
            color=None if colours is None else colours[index],
            error_kw={"lw": 0.8, "capsize": 2},
        )
    side = "right" if rotation else "center"
    axis.set_xticks(places, labels, rotation=rotation, ha=side, fontsize=8)


def curve(
    axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], **look: Any
) -> None:
    """A line with error bars; `values` as for `bars`, `look` for axis.errorbar."""
    means = [value[0] for value in values]
    axis.errorbar(x, means, yerr=_errors(values), capsize=2, **look)


def _errors(values: Sequence[Sequence[float]]) -> np.ndarray:
    """[2, n] how far each error bar reaches below and above."""
    if len(values[0]) == 2:
        return np.array([[value[1] for value in values]] * 2)
    middle, low, high = np.transpose(values)
    return np.maximum(0, [middle - low, high - middle])
