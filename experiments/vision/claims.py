# SPDX-License-Identifier: Apache-2.0
"""What the papers say of their methods, and whether the comparison's rows agree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Row]

NEAR, ATTACK = 0.03, 0.03  # of an accuracy, and of M1
WITHOUT = "multi-GAN without images"
APART = ("original", "retrain", "condensation", "multi-GAN", WITHOUT)


def table(rows: Sequence[Row], settings: Mapping[str, str]) -> list[str]:
    """Lines of Markdown: every claim in every setting, with its numbers."""
    out = ["| | claim | here |", "| --- | --- | --- |"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = {r["method"]: r for r in rows if r["setting"] == setting and "gap" in r}
        if "retrain" not in here or "original" not in here:
            continue
        title = settings.get(setting, setting)
        for method in (name for name in CLAIMS if name in here):
            for claim, test in CLAIMS[method].items():
                out.append(f"| {title} | {method} {claim} | {test(here, method)} |")
    return out


def _word(holds: bool, text: str) -> str:
    return f"{'holds' if holds else '**fails**'}: {text}"


def _faster(here: Rows, name: str) -> str:
    return _ratio(here, here[name]["seconds"][0])


def _faster_in_all(here: Rows, name: str) -> str:
    return _ratio(here, here[name]["seconds"][0] + here[name]["offline"][0])


def _ratio(here: Rows, spent: float) -> str:
    ratio = spent / here["retrain"]["seconds"][0]
    return _word(ratio < 1, f"{ratio:.2f} times the CPU seconds")


def _keeps(here: Rows, name: str) -> str:
    pairs = [
        (kind, here[name][kind][0], here["original"][kind][0])
        for kind in ("retain", "test")
    ]
    said = ", ".join(f"{k} {100 * a:.1f} for {100 * b:.1f} %" for k, a, b in pairs)
    return _word(all(a > b - NEAR for _, a, b in pairs), said)


def _forgets(here: Rows, name: str) -> str:
    own, again = (here[who]["forget"][0] for who in (name, "retrain"))
    said = f"{100 * own:.1f} % of them right, {100 * again:.1f} % when retrained"
    return _word(abs(own - again) <= NEAR, said)


def _hides(here: Rows, name: str) -> str:
    own, again = (here[who]["m1"][0] for who in (name, "retrain"))
    return _word(
        abs(own - again) <= ATTACK, f"M1 is {own:.2f}, {again:.2f} when retrained"
    )


def _beats(here: Rows, name: str) -> str:
    others = {n: r["gap"][0] for n, r in here.items() if n not in APART}
    if not others:
        return "not measured"
    best, own = min(others, key=others.get), here[name]["gap"][0]
    said = f"gap {100 * own:.1f}, the best of them, {best}, {100 * others[best]:.1f}"
    return _word(own < others[best], said)


def _drawn(here: Rows, name: str) -> str:
    if WITHOUT not in here:
        return "not measured"
    own, less = (here[who]["gap"][0] for who in (name, WITHOUT))
    return _word(own < less, f"gap {100 * own:.1f}, without them {100 * less:.1f}")


POINTS = f"(within {100 * NEAR:g} points)"
BOTH: Mapping[str, Callable[[Rows, str], str]] = {
    "takes less time than retraining": _faster,
    "does so with what comes before": _faster_in_all,
    f"keeps accuracy on the rest {POINTS}": _keeps,
    f"knows the forgotten as if retrained {POINTS}": _forgets,
    f"leaves attackers as much as retraining ({ATTACK:g})": _hides,
    "is nearer to retraining than standard methods": _beats,
}
CLAIMS = {
    "condensation": BOTH,
    "multi-GAN": {**BOTH, "is nearer to retraining by its drawn images": _drawn},
}
