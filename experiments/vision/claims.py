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
        for (method, claim), test in CLAIMS.items():
            if method in here:
                title = settings.get(setting, setting)
                out.append(f"| {title} | {method} {claim} | {test(here)} |")
    return out


def _word(holds: bool, text: str) -> str:
    return f"{'holds' if holds else '**fails**'}: {text}"


def _faster(name: str, offline: bool) -> Callable[[Rows], str]:
    def test(here):
        spent = here[name]["seconds"][0] + (here[name]["offline"][0] if offline else 0)
        ratio = spent / here["retrain"]["seconds"][0]
        return _word(ratio < 1, f"{ratio:.2f} times the CPU seconds")

    return test


def _keeps(name: str) -> Callable[[Rows], str]:
    def test(here):
        pairs = [
            (kind, here[name][kind][0], here["original"][kind][0])
            for kind in ("retain", "test")
        ]
        said = ", ".join(f"{k} {100 * a:.1f} for {100 * b:.1f} %" for k, a, b in pairs)
        return _word(all(a > b - NEAR for _, a, b in pairs), said)

    return test


def _forgets(name: str) -> Callable[[Rows], str]:
    def test(here):
        own, again = here[name]["forget"][0], here["retrain"]["forget"][0]
        said = f"{100 * own:.1f} % of them right, {100 * again:.1f} % when retrained"
        return _word(abs(own - again) <= NEAR, said)

    return test


def _hides(name: str) -> Callable[[Rows], str]:
    def test(here):
        own, again = here[name]["m1"][0], here["retrain"]["m1"][0]
        said = f"M1 is {own:.2f}, {again:.2f} when retrained"
        return _word(abs(own - again) <= ATTACK, said)

    return test


def _beats(name: str) -> Callable[[Rows], str]:
    def test(here):
        others = {n: r["gap"][0] for n, r in here.items() if n not in APART}
        if not others:
            return "not measured"
        best, own = min(others, key=others.get), here[name]["gap"][0]
        said = (
            f"gap {100 * own:.1f}, the best of them, {best}, {100 * others[best]:.1f}"
        )
        return _word(own < others[best], said)

    return test


def _of(name: str) -> dict[tuple[str, str], Callable[[Rows], str]]:
    points = f"{100 * NEAR:g} points"
    return {
        (name, "takes less time than retraining"): _faster(name, False),
        (name, "does so with what comes before"): _faster(name, True),
        (name, f"keeps accuracy on the rest (within {points})"): _keeps(name),
        (name, f"knows the forgotten as if retrained (within {points})"): _forgets(
            name
        ),
        (name, f"leaves attackers as much as retraining ({ATTACK:g})"): _hides(name),
        (name, "is nearer to retraining than standard methods"): _beats(name),
    }


def _drawn(here: Rows) -> str:
    if WITHOUT not in here:
        return "not measured"
    own, less = here["multi-GAN"]["gap"][0], here[WITHOUT]["gap"][0]
    return _word(own < less, f"gap {100 * own:.1f}, without them {100 * less:.1f}")


CLAIMS = _of("condensation") | _of("multi-GAN")
CLAIMS["multi-GAN", "is nearer to retraining by its drawn images"] = _drawn
