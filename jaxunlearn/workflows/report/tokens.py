# SPDX-License-Identifier: Apache-2.0
"""The tokens of forget rows, coloured by their log-probability under each model."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxunlearn.workflows.report import read

FLOOR = -8.0  # nats; a token of this log-probability or less is white
FULL = (245, 140, 60)  # the colour of a token of probability 1


class Token(NamedTuple):
    """A token's text, its colour, and its log-probability as text."""

    text: str
    colour: str
    tooltip: str


class Line(NamedTuple):
    """An answer under one model.

    Attributes:
        name, role: of the model.
        mean: the geometric mean of the tokens' probabilities, as text.
        tokens: the tokens of the answer.
    """

    name: str
    role: str
    mean: str
    tokens: Sequence[Token]


class Example(NamedTuple):
    """A question and its answer under every model."""

    id: str
    prompt: str
    lines: Sequence[Line]


def examples(
    models: Sequence[read.ModelResults], *, max_rows: int = 8, task: str = "forget"
) -> list[Example]:
    """Rows that all models with tokens have, evenly spread.

    Args:
        models: in the order of the lines.
        max_rows: maximum number of rows.
        task: the task of the rows.
    """
    shown = {
        model.name: model.tokens[task] for model in models if model.tokens.get(task)
    }
    if not shown:
        return []
    by_id = {name: {row["id"]: row for row in rows} for name, rows in shown.items()}
    common = [
        row["id"]
        for row in next(iter(shown.values()))
        if all(row["id"] in rows for rows in by_id.values())
    ]
    every = max(1, -(-len(common) // max_rows)) if max_rows else 1
    found = []
    for key in common[::every][:max_rows]:
        lines = [
            _line(model, by_id[model.name][key])
            for model in models
            if model.name in by_id
        ]
        prompt = next(iter(by_id.values()))[key]["prompt"]
        found.append(Example(str(key), prompt, lines))
    return found


def colour(logp: float | None) -> str:
    """White at FLOOR and below, FULL at 0, linear in nats between; grey for NaN."""
    if logp is None or math.isnan(logp):
        return "#dddddd"
    share = min(1.0, max(0.0, 1 - logp / FLOOR))
    mixed = (round(255 + share * (full - 255)) for full in FULL)
    return "#" + "".join(f"{x:02x}" for x in mixed)


def scale() -> list[tuple[str, str]]:
    """(probability as text, its colour) of the legend."""
    return [(f"{p:g}", colour(math.log(p))) for p in (1.0, 0.5, 0.1, 0.01, 0.001, 3e-4)]


def _line(model: read.ModelResults, row) -> Line:
    logps = row["logps"]
    finite = [x for x in logps if x is not None]
    mean = math.exp(sum(finite) / len(finite)) if finite else math.nan
    pieces = [
        Token(_visible(text), colour(logp), _tooltip(logp))
        for text, logp in zip(row["tokens"], logps, strict=True)
    ]
    text = "not finite" if math.isnan(mean) else f"{mean:.3f}"
    return Line(model.name, model.role, text, pieces)


def _visible(text: str) -> str:
    return text.replace("\n", "⏎\n") or "·"


def _tooltip(logp: float | None) -> str:
    if logp is None:
        return "not finite"
    return f"{logp:.2f} nats, probability {math.exp(logp):.3g}"
