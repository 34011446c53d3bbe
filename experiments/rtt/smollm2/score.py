# SPDX-License-Identifier: Apache-2.0
"""Numbers of RTT in SmolLM2, and the paper's claim, from its lines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.rtt.recovery import LESS, MOST, above, returned
from experiments.shared import intervals

Line = Mapping[str, Any]

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


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each model that was attacked on each set of facts.

    Returns:
        Rows: `of`, `who`, `facts` (held out, in all folds and seeds together), `seeds`,
        and accuracies on them as [value, low, high] with Wilson's interval: `before`
        the attack, `last` after its last epoch, `best` after the best epoch of each
        fold. For methods also that of the original on the same folds (`original`, last
        epoch), `rate`, `retain_rise` and `prose_rise` (nats a token above before),
        `choice` (accuracy on all facts before the attack), `forgot` (see `claim`), and
        as [value, low, high] over resampled facts `recovery` (last over original, the
        paper's), `above` (chance subtracted from both) and `returned` (of what was
        removed above chance); `best_recovery` uses the paper's choice of epochs.
    """
    found = []
    attacked = [x for x in lines if x["kind"] == "rtt"]
    for of, who in dict.fromkeys((x["of"], x["who"]) for x in attacked):
        runs = [x for x in attacked if (x["of"], x["who"]) == (of, who)]
        hits = _hits(runs)
        row = {"of": of, "who": who, "facts": hits["last"].size}
        row |= {"seeds": sorted({x["seed"] for x in runs})}
        row |= {name: intervals.wilson(each) for name, each in hits.items()}
        if who in NAMES:
            row |= _method(lines, runs, hits)
        found.append(row)
    return found


def _hits(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Whether each fact held out was answered right: before, last, best."""
    each = [np.asarray(line["hits"]) for line in lines]
    return {
        "before": np.concatenate([x[0] for x in each]),
        "last": np.concatenate([x[-1] for x in each]),
        "best": np.concatenate([x[x.mean(1).argmax()] for x in each]),
    }


def _method(lines, attacks, hits) -> dict[str, Any]:
    """What a row of a method has besides accuracies."""
    of, who = attacks[0]["of"], attacks[0]["who"]
    first = next(x for x in lines if x["kind"] == "facts" and x["of"] == of)
    runs = [
        x
        for x in lines
        if (x["kind"], x["of"], x.get("method")) == ("unlearned", of, who)
        and x["rate"] == attacks[0]["rate"]
    ]
    row: dict[str, Any] = {"rate": attacks[0]["rate"]}
    for name in ("retain_loss", "prose_loss"):
        rise = np.mean([x[name] for x in runs]) - first[name]
        row[name.replace("loss", "rise")] = float(rise)
    row["choice"] = float(np.mean([x["choice"] for x in runs]))
    row["forgot"] = bool(above(row["choice"], first["choice"]) <= MOST)
    same = [_original(lines, line) for line in attacks]
    if None in same:
        return row
    original = _hits(same)
    row["original"] = intervals.wilson(original["last"])
    pairs = np.stack([hits["last"], hits["before"], original["last"]])
    for name, function in (
        ("recovery", lambda x: above(x[0], x[2], 0.0)),
        ("above", lambda x: above(x[0], x[2])),
        ("returned", returned),
    ):
        row[name] = intervals.bootstrap(lambda x, f=function: f(x.mean(-1)), pairs)
    best = original["best"].mean()
    row["best_recovery"] = float(hits["best"].mean() / best) if best else math.nan
    return row


def _original(lines, line) -> Line | None:
    """The same attack on the original."""
    name = f"rtt {line['of']} original {line['seed']} {line['fold']}"
    return next((x for x in lines if x["key"] == name), None)


def rise(line: Line, before: Mapping[str, float]) -> float:
    """The larger rise of the losses on the retain stream and on prose, nats a token;
    infinite if the run diverged."""
    if not line["finite"]:
        return math.inf
    return max(line[k] - before[k] for k in ("retain_loss", "prose_loss"))


def claim(lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What came back of each set of facts, and whether the paper's claim holds.

    Returns:
        `returned`: set -> [value, low, high], the fraction that came back of all that
        the methods together removed above chance, over resampled facts; `methods` and
        `forgot`: set -> the methods in it, and those that forgot: whose accuracy on all
        facts before the attack is halfway to chance or below; `less`: how much less of
        the facts finetuned in comes back than of pretraining's (the mean over its
        sets); `most_returns` (by set) and `much_less`: "holds", "fails" or "undecided".
        A set of which nothing was removed is in none of them.
    """
    facts, found = {}, {"returned": {}, "methods": {}, "forgot": {}}
    for of in TITLES:
        tried = [row["who"] for row in rows if row["of"] == of and "original" in row]
        runs = [
            {
                (x["seed"], x["fold"]): x
                for x in lines
                if (x["kind"], x["of"], x.get("who")) == ("rtt", of, who)
            }
            for who in tried
        ]
        # Of a stopped run, the folds that every method has.
        shared = sorted(set.intersection(*map(set, runs))) if runs else []
        if not shared:
            continue
        hits = [_hits([each[key] for key in shared]) for each in runs]
        original = _hits([_original(lines, runs[0][key]) for key in shared])
        parts = [[x[key] for x in hits] for key in ("last", "before")]
        array = np.stack([*parts[0], *parts[1], original["last"]])
        value = intervals.bootstrap(_came_back, array)
        if value is None:
            continue
        facts[of], found["returned"][of] = array, value
        found["methods"][of] = tried
        found["forgot"][of] = [
            row["who"]
            for row in rows
            if row["of"] == of and row["who"] in tried and row["forgot"]
        ]
    found["most_returns"] = {
        of: intervals.verdict(x, MOST)
        for of, x in found["returned"].items()
        if of != LATE
    }
    early = [facts[of] for of in EARLY if of in facts]
    if early and LATE in facts:

        def less(late, *others):
            return np.mean([_came_back(x) for x in others], axis=0) - _came_back(late)

        found["less"] = intervals.bootstrap(less, facts[LATE], *early)
        found["much_less"] = intervals.much_larger(found["less"], LESS)
    return found


def _came_back(hits: np.ndarray) -> np.ndarray:
    return returned(hits.mean(-1))
