# SPDX-License-Identifier: Apache-2.0
"""Tokens of rows to forget, coloured by what each is worth to each model."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxunlearn.workflows.report import read

FLOOR = -8.0  # nats; a token worth less has no colour
FULL = (245, 140, 60)  # the colour of a token that is certain, on white


class Token(NamedTuple):
    """A piece of text, its colour, and its log-probability in words."""

    text: str
    colour: str
    said: str


class Line(NamedTuple):
    """An answer as one model sees it.

    Attributes:
        name, role: of the model.
        mean: geometric mean of its tokens' probabilities, in words.
        tokens: the answer.
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
    runs: Sequence[read.Run], *, most: int = 8, task: str = "forget"
) -> list[Example]:
    """The first rows that all runs with tokens show, spread over those there are.

    Args:
        runs: in the order of the lines.
        most: examples at most.
        task: whose rows.
    """
    shown = {run.name: run.tokens[task] for run in runs if run.tokens.get(task)}
    if not shown:
        return []
    by_id = {name: {row["id"]: row for row in rows} for name, rows in shown.items()}
    common = [
        row["id"]
        for row in next(iter(shown.values()))
        if all(row["id"] in rows for rows in by_id.values())
    ]
    every = max(1, -(-len(common) // most)) if most else 1
    found = []
    for key in common[::every][:most]:
        lines = [_line(run, by_id[run.name][key]) for run in runs if run.name in by_id]
        prompt = next(iter(by_id.values()))[key]["prompt"]
        found.append(Example(str(key), prompt, lines))
    return found


def colour(logp: float | None) -> str:
    """White at FLOOR and below, FULL at 0, linear between in nats; grey for NaN."""
    if logp is None or math.isnan(logp):
        return "#dddddd"
    share = min(1.0, max(0.0, 1 - logp / FLOOR))
    mixed = (round(255 + share * (full - 255)) for full in FULL)
    return "#" + "".join(f"{x:02x}" for x in mixed)


def scale() -> list[tuple[str, str]]:
    """(probability in words, its colour) of the legend."""
    return [(f"{p:g}", colour(math.log(p))) for p in (1.0, 0.5, 0.1, 0.01, 0.001, 3e-4)]


def _line(run: read.Run, row) -> Line:
    logps = row["logps"]
    known = [x for x in logps if x is not None]
    mean = math.exp(sum(known) / len(known)) if known else math.nan
    pieces = [
        Token(_visible(text), colour(logp), _said(logp))
        for text, logp in zip(row["tokens"], logps, strict=True)
    ]
    said = "not finite" if math.isnan(mean) else f"{mean:.3f}"
    return Line(run.name, run.role, said, pieces)


def _visible(text: str) -> str:
    return text.replace("\n", "⏎\n") or "·"


def _said(logp: float | None) -> str:
    if logp is None:
        return "not finite"
    return f"{logp:.2f} nats, probability {math.exp(logp):.3g}"
