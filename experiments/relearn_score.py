# SPDX-License-Identifier: Apache-2.0
"""Numbers of retraining on T in SmolLM2, and the paper's claim, from its lines."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Line = Mapping[str, Any]

CHANCE = 0.25
MOST = 0.5  # of what the original has above chance: above it, most came back
LESS = 0.2  # of the same: so much less of facts finetuned in is much less
EARLY, LATE = ("capitals", "mmlu"), "birthdays"
TITLES = {
    "capitals": "capitals of Europe (pretraining)",
    "mmlu": "questions of MMLU (pretraining)",
    "birthdays": "birthdays (finetuned in)",
}
NAMES = {
    "graddiff": "GradDiff",
    "incorrect": "incorrect answer",
    "npo": "NPO",
    "rmu": "RMU",
    "blur_npo": "BLUR-NPO",
}
DRAWS = 4000


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each who was attacked on each kind of facts.

    Returns:
        Rows: `of`, `who`, `facts` (held out, of all folds and seeds together), `seeds`,
        and accuracies on them as [value, low, high] with Wilson's interval: `before`
        the attack, `last` after its last epoch, `best` after the best epoch of each
        fold. For methods also that of the model before unlearning on the same folds
        (`original`, last epoch), `rate`, `retain_rise` and `prose_rise` (nats a token
        above before), `choice` (accuracy on all facts before the attack), `forgot` (see
        `claim`), and as [value, low, high] over resampled facts `recovery` (last over
        original, the paper's), `above` (chance taken off both) and `returned` (of what
        was lost); `best_recovery` is the paper's own choice of epochs.
    """
    found = []
    attacked = [x for x in lines if x["kind"] == "rtt"]
    for of, who in dict.fromkeys((x["of"], x["who"]) for x in attacked):
        own = [x for x in attacked if (x["of"], x["who"]) == (of, who)]
        hits = _hits(own)
        row = {"of": of, "who": who, "facts": hits["last"].size}
        row |= {"seeds": sorted({x["seed"] for x in own})}
        row |= {name: accuracy(each) for name, each in hits.items()}
        if who in NAMES:
            row |= _method(lines, own, hits)
        found.append(row)
    return found


def _hits(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Of every fact held out, whether it was answered right: before, last, best."""
    each = [np.asarray(line["hits"]) for line in lines]
    return {
        "before": np.concatenate([x[0] for x in each]),
        "last": np.concatenate([x[-1] for x in each]),
        "best": np.concatenate([x[x.mean(1).argmax()] for x in each]),
    }


def _method(lines, own, hits) -> dict[str, Any]:
    """What a row has for a method beside accuracies."""
    of, who = own[0]["of"], own[0]["who"]
    first = next(x for x in lines if x["kind"] == "facts" and x["of"] == of)
    runs = [
        x
        for x in lines
        if (x["kind"], x["of"], x.get("who")) == ("unlearned", of, who)
        and x["rate"] == own[0]["rate"]
    ]
    row: dict[str, Any] = {"rate": own[0]["rate"]}
    for name in ("retain_loss", "prose_loss"):
        rise = np.mean([x[name] for x in runs]) - first[name]
        row[name.replace("loss", "rise")] = float(rise)
    row["choice"] = float(np.mean([x["choice"] for x in runs]))
    row["forgot"] = _above(row["choice"], first["choice"]) <= MOST
    same = [_original(lines, line) for line in own]
    if None in same:
        return row
    most = _hits(same)
    row["original"] = accuracy(most["last"])
    pairs = np.stack([hits["last"], most["last"], hits["before"]])
    for name, function in (
        ("recovery", lambda x: x[0] / x[1] if x[1] else math.nan),
        ("above", lambda x: _above(x[0], x[1])),
        ("returned", lambda x: _returned(*x)),
    ):
        row[name] = interval(lambda x, f=function: f(x.mean(-1)), pairs)
    best = most["best"].mean()
    row["best_recovery"] = float(hits["best"].mean() / best) if best else math.nan
    return row


def _original(lines, line) -> Line | None:
    """The same attack on the model before unlearning."""
    name = f"rtt {line['of']} original {line['seed']} {line['fold']}"
    return next((x for x in lines if x["key"] == name), None)


def _above(value: float, most: float) -> float:
    """Of what `most` is above chance, how much `value` is."""
    return (value - CHANCE) / (most - CHANCE) if most > CHANCE else math.nan


def _returned(after: float, most: float, before: float) -> float:
    return (after - before) / (most - before) if most > before else math.nan


def accuracy(hits: np.ndarray) -> list[float]:
    """[mean, low, high] with Wilson's 95 % interval."""
    n, p, z = hits.size, float(hits.mean()), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [p, max(0.0, middle - half), min(1.0, middle + half)]


def interval(
    function: Callable[[np.ndarray], float], *facts: np.ndarray
) -> list[float] | None:
    """[value, low, high]: 95 % of the values on facts drawn anew.

    Args:
        function: of as many arrays as given.
        facts: each [..., n]; each kind of facts is drawn by itself.
    Returns:
        None where the value is not a number.
    """
    value, rng, found = float(function(*facts)), np.random.default_rng(0), []
    if math.isnan(value):
        return None
    for _ in range(DRAWS):
        drawn = [x[..., rng.integers(0, x.shape[-1], x.shape[-1])] for x in facts]
        found.append(function(*drawn))
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return [value, float(low), float(high)]


def claim(lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What came back of each kind, and what the paper claims of it.

    Only methods that forgot count: whose accuracy on all facts before the attack is
    halfway to chance or below.

    Returns:
        `above`: kind -> [value, low, high], mean over methods of what comes back above
        chance, over resampled facts; `methods`: kind -> who forgot; `less`: how much
        less of facts finetuned in comes back than of pretraining's (the mean over its
        kinds); `most_returns` (by kind) and `much_less`: "holds", "fails" or
        "undecided". A kind without a method that forgot is in none of them.
    """
    facts, methods = {}, {}
    for of in TITLES:
        forgot = [r for r in rows if r["of"] == of and r.get("forgot") and r["above"]]
        # The same facts for all: of a cut run, those of folds that every one has.
        own = [
            {(x["seed"], x["fold"]): x for x in lines if _is(x, of, row["who"])}
            for row in forgot
        ]
        shared = set.intersection(*map(set, own)) if own else set()
        if not shared:
            continue
        order = sorted(shared)
        most = [_original(lines, own[0][key]) for key in order]
        hits = [_hits([each[key] for key in order])["last"] for each in own]
        facts[of] = np.stack([np.mean(hits, 0), _hits(most)["last"]])
        methods[of] = [row["who"] for row in forgot]

    def above(x):
        return _above(*x.mean(-1))

    found: dict[str, Any] = {"methods": methods}
    found["above"] = {of: interval(above, x) for of, x in facts.items()}
    found["most_returns"] = {
        of: _verdict(x, MOST) for of, x in found["above"].items() if x and of != LATE
    }
    early = [facts[of] for of in EARLY if of in facts]
    if early and LATE in facts:

        def less(late, *others):
            return np.mean([above(x) for x in others]) - above(late)

        found["less"] = interval(less, facts[LATE], *early)
        found["much_less"] = _less(found["less"]) if found["less"] else None
    return found


def _is(line, of, who) -> bool:
    return (line["kind"], line["of"], line.get("who")) == ("rtt", of, who)


def _less(value: Sequence[float]) -> str:
    """Whether it is LESS or more and surely above 0, or surely not LESS."""
    if value[0] >= LESS and value[1] > 0:
        return "holds"
    return "fails" if value[2] < LESS else "undecided"


def _verdict(value: Sequence[float], bar: float) -> str:
    """Whether the whole interval is above the bar, or below it."""
    return "holds" if value[1] > bar else "fails" if value[2] < bar else "undecided"
