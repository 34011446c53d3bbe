# SPDX-License-Identifier: Apache-2.0
"""Numbers of RTT in the small world, and the paper's claim, from its lines.

The floor is the retrained model, which never saw the facts, before any attack: what is
above it can be removed, and what a method removed of that can come back.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.rtt.recovery import CHANCE, LESS, MOST, above, returned
from experiments.shared import intervals

Line = Mapping[str, Any]

MEASURES = ("choice", "verbatim")
REFERENCES = ("original", "retrained", "never seen", "finetuned original")
CONTROLS = ("retrained", "never seen")
BASES = {"original": "in pretraining", "finetuned original": "by finetuning"}
EARLY, LATE = BASES


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each model that was attacked.

    Returns:
        Rows: who, base, method, seeds, folds (of all seeds together), facts, rate and
        the unlearning's `retain_loss` and `forget_probability` (mean over its seeds),
        and for each measure as [mean, deviation over seeds] on facts held out `before`,
        `last` and `best` (see held_out), `recovery` (best over that of the base: the
        paper's) and `above` (the same with the retrained model's best subtracted from
        both). For methods also `left`, the fraction of what the base has above the
        retrained model before any attack that the method left, `forgot` (whether that
        is half or less), and as [value, low, high] over resampled folds `returned` and
        `best_returned`: the fraction of what was removed that came back by the last and
        by the best epoch. For controls `controls`.
    """
    found = []
    attacked = [line for line in lines if line["kind"] == "rtt"]
    for who in dict.fromkeys(line["who"] for line in attacked):
        runs = [line for line in attacked if line["who"] == who]
        base = LATE if who.startswith("finetuned") else EARLY
        row = {"who": who, "base": base, "method": who.removeprefix("finetuned ")}
        row |= {"folds": len(runs), "seeds": sorted({line["seed"] for line in runs})}
        row["rate"] = runs[0].get("rate")
        row["facts"] = sum(line["facts"] for line in runs)
        row["finite"] = all(all(line["finite"]) for line in runs)
        used = taken(lines, row)
        for key in ("retain_loss", "forget_probability", "retain_exact"):
            row[key] = statistics.mean(x[key] for x in used) if used else None
        for measure in MEASURES:
            row[measure] = _measured(attacked, row, measure)
        if who in CONTROLS:
            row["controls"] = _control(runs)
        found.append(row)
    return found


def taken(lines: Sequence[Line], row: Mapping[str, Any]) -> list[Line]:
    """The unlearned models of a row that were attacked, one a seed."""
    of = "finetuned" if row["base"] == LATE else "pretrained"
    used = ("unlearned", of, row["method"], row["rate"])
    keys = ("kind", "of", "method", "rate")
    return [x for x in lines if tuple(x.get(key) for key in keys) == used]


def held_out(lines: Sequence[Line], measure: str) -> dict[tuple[int, int], Line]:
    """(seed, fold) -> the facts held out before, after the last, and the best epoch.

    *Last* is at the rate that is better on the other folds of the seed (verbatim, after
    the last epoch), so that the rate is not chosen on the facts it is scored on. *Best*
    is over all rates and epochs, that before the attack too, on the facts themselves:
    the paper's choice.
    """
    found = {}
    for line in lines:
        same = [x for x in lines if _sweep(x) == _sweep(line)]
        others = [x for x in same if x["fold"] != line["fold"]] or [line]
        last = np.average(
            [np.asarray(x["verbatim"])[:, -1] for x in others],
            axis=0,
            weights=[x["facts"] for x in others],
        )
        values = np.asarray(line[measure])
        found[line["seed"], line["fold"]] = {
            "before": values[0, 0],
            "last": values[last.argmax(), -1],
            "best": values.max(),
            "facts": line["facts"],
        }
    return found


def _sweep(line: Line) -> tuple[Any, ...]:
    return line["who"], line["seed"], tuple(line["rates"])


def _measured(attacked, row, measure) -> dict[str, Any]:
    def of(who):
        return held_out([x for x in attacked if x["who"] == who], measure)

    held, base, retrained = of(row["who"]), of(row["base"]), of("retrained")
    found = {"before": [], "last": [], "best": [], "recovery": [], "above": []}
    for seed in row["seeds"]:
        folds = [fold for at, fold in held if at == seed]
        values = {k: _mean(held, k, folds, seed) for k in ("before", "last", "best")}
        if set(folds) <= _folds(base):
            best = _mean(base, "best", folds)
            values["recovery"] = values["best"] / best
            if set(folds) <= _folds(retrained):
                floor = _mean(retrained, "best", folds)
                values["above"] = above(values["best"], best, floor)
        for key, value in values.items():
            found[key].append(value)
    found = {k: intervals.spread(x) if x else None for k, x in found.items()}
    shared = _folds(held) & _folds(base) & _folds(retrained)
    if row["who"] in REFERENCES or not shared:
        return found
    for key, after in (("returned", "last"), ("best_returned", "best")):
        array = _array([held], base, retrained, shared, after)
        found[key] = intervals.bootstrap(_came_back, array)
    found["left"] = _left(_array([held], base, retrained, shared))
    return found | {"forgot": bool(found["left"] <= MOST)}


def _folds(held) -> set[int]:
    return {fold for _, fold in held}


def _mean(held, key, folds, seed=None) -> float:
    """Mean over the facts of folds, of one seed or of all."""
    each = [x for (at, fold), x in held.items() if fold in folds and seed in (None, at)]
    values, weights = [x[key] for x in each], [x["facts"] for x in each]
    return float(np.average(values, weights=weights))


def _array(methods, base, retrained, folds, after="last") -> np.ndarray:
    """[2 M + 4, folds]: what `_came_back` and `_left` need, columns to resample.

    M methods after the attack, before it (means over seeds), the base after and before
    it, the retrained model before it, and how many facts there are.
    """

    def each(held, key):
        return [_mean(held, key, [fold]) for fold in sorted(folds)]

    return np.array(
        [
            *(each(held, after) for held in methods),
            *(each(held, "before") for held in methods),
            each(base, after),
            each(base, "before"),
            each(retrained, "before"),
            each(retrained, "facts"),
        ]
    )


def _means(array: np.ndarray) -> np.ndarray:
    return (array[:-1] * array[-1]).sum(-1) / array[-1].sum(-1)


def _came_back(array: np.ndarray) -> np.ndarray:
    means = _means(array)
    return returned(means[:-2], floor=means[-1])


def _left(array: np.ndarray) -> float:
    """The fraction of what the base has above the retrained model that methods left."""
    means = _means(array)
    methods = means[len(means[:-3]) // 2 : -3]
    return float(above(methods.mean(), means[-2], means[-1]))


def _control(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """By rate: choice after the last epoch as [value, low, high], Wilson's interval."""
    found = []
    for i, rate in enumerate(lines[0]["rates"]):
        scored = [(x["choice"][i][-1], x["facts"]) for x in lines]
        count = sum(n for _, n in scored)
        hits = round(sum(value * n for value, n in scored))
        value = intervals.wilson(np.arange(count) < hits)
        differs = not value[1] <= CHANCE <= value[2]
        found.append({"rate": rate, "last": value, "differs_from_chance": differs})
    return found


def claim(lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What came back of each base, and whether the paper's claim holds.

    Returns:
        By base and measure `returned` [value, low, high], the fraction that came back
        after the last epoch of what all methods together removed, over resampled folds,
        `best_returned` the same by the best epoch, `left` as in summarise, of all
        together; by measure `most_returns`, whether most of pretraining's does; `less`,
        how much less comes back of facts finetuned in, by the methods, seeds and folds
        that both have (`compared`); `much_less`: whether that is much. Verdicts are
        "holds", "fails" or "undecided"; what was not measured is in none of them.
    """
    keys = ("returned", "best_returned", "left", "most_returns", "less", "much_less")
    found: dict[str, Any] = {key: {} for key in keys}
    for base in BASES:
        tried = [row for row in rows if row["base"] == base and _is_method(row)]
        for measure in MEASURES:
            held = [_held(lines, row["who"], measure) for row in tried]
            rest = [_held(lines, who, measure) for who in (base, "retrained")]
            folds = set.intersection(*map(_folds, held + rest)) if tried else ()
            if not folds:
                continue
            array = _array(held, *rest, folds)
            best = intervals.bootstrap(_came_back, _array(held, *rest, folds, "best"))
            for key, value in (
                ("returned", intervals.bootstrap(_came_back, array)),
                ("best_returned", best),
                ("left", _left(array)),
            ):
                found[key].setdefault(base, {})[measure] = value
            value = found["returned"][base][measure]
            if base == EARLY and value is not None:
                # One fold alone has an interval without width, which decides nothing.
                word = intervals.verdict(value, MOST)
                word = word if len(folds) > 1 else "undecided"
                found["most_returns"][measure] = word
    return found | _less(lines, rows, found)


def _less(lines, rows, found) -> dict[str, Any]:
    """How much less comes back of facts finetuned in, by what both bases have."""
    late = [row for row in rows if row["base"] == LATE and _is_method(row)]
    early = {row["who"]: row for row in rows if row["base"] == EARLY}
    late = [row for row in late if row["method"] in early]
    if not late:
        return {}
    seeds = set.intersection(
        *(set(row["seeds"]) & set(early[row["method"]]["seeds"]) for row in late)
    )
    for measure in MEASURES:
        both = []
        for base, who in ((EARLY, "method"), (LATE, "who")):
            held = [_held(lines, row[who], measure, seeds) for row in late]
            both.append((held, [_held(lines, x, measure) for x in (base, "retrained")]))
        folds = set.intersection(*(_folds(x) for part in both for x in sum(part, [])))
        if not folds:
            continue
        array = np.stack([_array(held, *rest, folds) for held, rest in both])
        value = intervals.bootstrap(
            lambda x: _came_back(x[0]) - _came_back(x[1]), array
        )
        if value is not None:
            found["less"][measure] = value
            word = intervals.much_larger(value, LESS)
            word = word if len(folds) > 1 else "undecided"
            found["much_less"][measure] = word
    return {
        "compared": {"methods": [x["method"] for x in late], "seeds": sorted(seeds)}
    }


def _held(lines, who, measure, seeds=None) -> dict[tuple[int, int], Line]:
    runs = [x for x in lines if x["kind"] == "rtt" and x["who"] == who]
    return held_out([x for x in runs if seeds is None or x["seed"] in seeds], measure)


def _is_method(row) -> bool:
    return row["who"] not in REFERENCES
