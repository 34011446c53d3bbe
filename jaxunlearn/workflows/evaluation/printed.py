# SPDX-License-Identifier: Apache-2.0
"""Numbers of evaluations as lines of text: a short table, or all of them."""

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, Mapping[str, Any]]  # the content of metrics.json

SHORT = (
    "probability",
    "end_nll",
    "normalised_probability",
    "rougeL_recall",
    "rougeL_f1",
    "exact_memorization",
    "accuracy",
    "calibrated_accuracy",
    "perplexity",
    "rows_left_out",
)
SHORT_OVERALL = ("forget_quality", "model_utility", "mia_min_k_auc", "privleak")


def table(by_role: Mapping[str, Metrics]) -> list[str]:
    """A short table: a line for each metric of each task, a column for each model.

    Args:
        by_role: the model's role -> the content of its metrics.json.
    """
    names = list(by_role)
    lines = [["", "", *names]]
    tasks = dict.fromkeys(task for found in by_role.values() for task in found["tasks"])
    for task in [*tasks, "overall"]:
        columns = [_numbers(found, task) for found in by_role.values()]
        title = task
        for metric in SHORT_OVERALL if task == "overall" else SHORT:
            cells = [number(column.get(metric)) for column in columns]
            if any(cells) and (metric != "rows_left_out" or set(cells) != {"0"}):
                lines.append([title, metric.replace("_", " "), *cells])
                title = ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    note = "Brackets: 95 % intervals (bootstrap over the rows)."
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ] + [note]


def everything(metrics: Metrics) -> list[str]:
    """A line with all numbers of each task, and one with those of all tasks."""
    return [
        f"{task}: "
        + ", ".join(
            f"{name} {number(found)}" for name, found in _numbers(metrics, task).items()
        )
        for task in [*metrics["tasks"], "overall"]
    ]


def number(found: Mapping[str, Any] | None) -> str:
    """A number with its interval; "" if there is none."""
    if found is None:
        return ""
    if found["value"] is None:
        return "not finite"
    text = f"{found['value']:.4g}"
    if found["low"] is not None:
        text += f" [{found['low']:.3g}, {found['high']:.3g}]"
    return text


def _numbers(metrics: Metrics, task: str) -> Mapping[str, Any]:
    return metrics["overall"] if task == "overall" else metrics["tasks"].get(task, {})
