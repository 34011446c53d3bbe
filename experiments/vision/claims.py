# SPDX-License-Identifier: Apache-2.0
"""Claims of the condensation and multi-GAN papers, tested on the comparison's rows.

Each claim is tested on every seed: it holds if it does on every seed, fails if on none,
and is undecided otherwise. Other data, networks or settings may give other verdicts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Rows = Sequence[Row]
Here = Mapping[str, Row]  # method -> row, of one setting
Outcome = tuple[bool | None, str]  # whether a claim holds, and the numbers

MARGIN = 0.03  # of an accuracy, and of M1
WITHOUT = "multi-GAN without images"
NOT_STANDARD = ("original", "retrained", "condensation", "multi-GAN", WITHOUT)


class Tested(NamedTuple):
    """A claim about one method in one setting of one data set.

    Attributes:
        setting, name: which claim; the name is a word or two.
        claim: what follows the method's name.
        verdict: "holds", "fails", "undecided", or "not measured" where a method that
            the claim needs was not run.
        numbers: means over seeds.
    """

    setting: str
    name: str
    claim: str
    verdict: str
    numbers: str

    @property
    def cell(self) -> str:
        word = self.verdict if self.verdict == "holds" else f"**{self.verdict}**"
        return f"{word}: {self.numbers}" if self.numbers else word


def tested(rows: Rows, seeds: Sequence[Rows], method: str) -> list[Tested]:
    """Every claim about a method, in every setting that has its reference models.

    Args:
        rows: a row for every setting and method: means over seeds.
        seeds: the same of every seed alone.
        method: "condensation" or "multi-GAN".
    """
    found = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        means = _methods(rows, setting)
        if not {"retrained", "original", method} <= means.keys():
            continue
        alone = [_methods(each, setting) for each in seeds]
        alone = [x for x in alone if {"retrained", "original", method} <= x.keys()]
        for name, (claim, test) in CLAIMS[method].items():
            numbers = test(means, method)[1]
            verdict = _verdict([test(here, method)[0] for here in alone])
            found.append(Tested(setting, name, claim, verdict, numbers))
    return found


def _methods(rows: Rows, setting: str) -> Here:
    return {r["method"]: r for r in rows if r["setting"] == setting and "gap" in r}


def _verdict(outcomes: Sequence[bool | None]) -> str:
    if not outcomes or None in outcomes:
        return "not measured"
    return "holds" if all(outcomes) else "undecided" if any(outcomes) else "fails"


def _faster(here: Here, name: str) -> Outcome:
    return _ratio(here, here[name]["seconds"][0])


def _faster_in_all(here: Here, name: str) -> Outcome:
    return _ratio(here, here[name]["seconds"][0] + here[name]["offline"][0])


def _ratio(here: Here, seconds: float) -> Outcome:
    ratio = seconds / here["retrained"]["seconds"][0]
    return ratio < 1, f"{ratio:.2f} times the CPU seconds"


def _keeps_accuracy(here: Here, name: str) -> Outcome:
    pairs = [
        (key, here[name][key][0], here["original"][key][0])
        for key in ("retain", "test")
    ]
    numbers = ", ".join(
        f"{key} {100 * a:.1f} %, original {100 * b:.1f} %" for key, a, b in pairs
    )
    return all(a > b - MARGIN for _, a, b in pairs), numbers


def _forgets(here: Here, name: str) -> Outcome:
    value, reference = (here[x]["forget"][0] for x in (name, "retrained"))
    numbers = f"forget accuracy {100 * value:.1f} %, retrained {100 * reference:.1f} %"
    return abs(value - reference) <= MARGIN, numbers


def _hides(here: Here, name: str) -> Outcome:
    value, reference = (here[x]["m1"][0] for x in (name, "retrained"))
    numbers = f"M1 {value:.2f}, retrained {reference:.2f}"
    return abs(value - reference) <= MARGIN, numbers


def _nearest(here: Here, name: str) -> Outcome:
    others = {n: r["gap"][0] for n, r in here.items() if n not in NOT_STANDARD}
    if not others:
        return None, ""
    best, value = min(others, key=others.get), here[name]["gap"][0]
    numbers = f"gap {100 * value:.1f}, best standard method {best} "
    return value < others[best], numbers + f"{100 * others[best]:.1f}"


def _images_help(here: Here, name: str) -> Outcome:
    if WITHOUT not in here:
        return None, ""
    value, without = (here[x]["gap"][0] for x in (name, WITHOUT))
    return value < without, f"gap {100 * value:.1f}, without {100 * without:.1f}"


POINTS = f"within {100 * MARGIN:g} points"
BOTH: Mapping[str, tuple[str, Callable[[Here, str], Outcome]]] = {
    "time": ("takes less time than retraining", _faster),
    "time with preparation": (
        "takes less time than retraining, preparation included",
        _faster_in_all,
    ),
    "retained accuracy": (
        f"keeps the original's accuracy on retained data ({POINTS})",
        _keeps_accuracy,
    ),
    "forget accuracy": (
        f"has the retrained model's forget accuracy ({POINTS})",
        _forgets,
    ),
    "attack": (
        f"has the retrained model's value of attack M1 (within {MARGIN:g})",
        _hides,
    ),
    "standard methods": (
        "is nearer to the retrained model than standard methods",
        _nearest,
    ),
}
CLAIMS = {
    "condensation": BOTH,
    "multi-GAN": {
        **BOTH,
        "drawn images": (
            "is nearer to the retrained model with drawn images than without",
            _images_help,
        ),
    },
}
