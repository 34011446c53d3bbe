# SPDX-License-Identifier: Apache-2.0
"""From rows to numbers: means with intervals, forget quality, utility, attacks.

Every number is {"value", "low", "high", "n"}. `low` and `high` are the ends of its 95 %
interval (percentile bootstrap over rows), None if it has none; `n` is the number of
rows. A number is NaN if the value of any of its rows is NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxunlearn import metrics
from jaxunlearn.workflows.evaluation import values

MEANS = (
    "probability",
    "end_nll",
    "normalised_probability",
    "truth_score",
    "rouge1_recall",
    "rougeL_recall",
    "rougeL_f1",
    "exact_memorization",
    "extraction_strength",
    "accuracy",
    "calibrated_accuracy",
)
ATTACKS = ("loss", "reference", "zlib", "min_k", "min_k_plus_plus", "gradnorm")
UTILITY = {  # the nine parts of model utility: task -> columns
    "retain": ("probability", "rougeL_recall", "truth_score"),
    "real_authors": ("normalised_probability", "rougeL_recall", "truth_score"),
    "world_facts": ("normalised_probability", "rougeL_recall", "truth_score"),
}

Rows = Sequence[Mapping[str, Any]]
Number = dict[str, Any]


def of_task(
    rows: Rows,
    left_out: int,
    *,
    judges: Sequence[str] = (),
    num_resamples: int,
    seed: int,
) -> dict[str, Number]:
    """Means over a task's rows, its perplexity, and the number of rows left out.

    Args:
        rows: the values of each row.
        left_out: number of rows that were too long.
        judges: names of judges, whose scores are averaged too.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    found = {}
    for name in (*MEANS, *judges):
        if name in rows[0]:
            found[name] = _number(
                metrics.mean, [column(rows, name)], num_resamples, seed
            )
    nll, tokens = column(rows, "nll"), column(rows, "tokens")
    picked = np.arange(len(rows))
    found["perplexity"] = _number(
        lambda i: _perplexity(nll[i.astype(int)], tokens[i.astype(int)]),
        [np.where(np.isnan(nll), np.nan, picked)],
        num_resamples,
        seed,
    )
    total = len(rows) + left_out
    found["rows_left_out"] = {"value": left_out, "low": None, "high": None, "n": total}
    return found


def overall(
    tasks: Mapping[str, Rows],
    retrained: Mapping[str, Rows] | None = None,
    *,
    compat: str = "",
    num_resamples: int,
    seed: int,
) -> dict[str, Number]:
    """Numbers that need several tasks.

    Args:
        tasks: task -> rows of this model.
        retrained: the same of the retrained model. Forget quality and the attack
            Reference need it. PrivLeak compares with it, or else with an AUC of 0.5.
        compat: as in tasks.Settings.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    Returns:
        `model_utility`, `forget_quality`, `forget_quality_distance` (the
        Kolmogorov-Smirnov statistic), `mia_<attack>_auc` and `privleak`, those that the
        tasks allow. A p-value and its statistic have no interval: rows that are drawn
        twice would make ties and shift them.
    """
    found = {}
    if all(
        part in rows_of(tasks, name)[0] for name in UTILITY for part in UTILITY[name]
    ):
        found["model_utility"] = _utility(tasks, num_resamples, seed)
    forget = rows_of(tasks, "forget")
    if retrained and "truth_ratio" in forget[0]:
        found |= _quality(forget, rows_of(retrained, "forget"))
    if "holdout" not in tasks or "forget" not in tasks:
        return found
    for attack in ATTACKS:
        pair = _attacked(attack, tasks, retrained)
        if pair:
            name = f"mia_{attack}_auc"
            found[name] = _number(metrics.auc, pair, num_resamples, seed)
    eps = values.EPS[compat]
    other = 0.5
    if retrained and "holdout" in retrained:
        other = metrics.auc(*_attacked("min_k", retrained, None))
    if math.isfinite(found["mia_min_k_auc"]["value"]) and (other < 1 or eps):
        found["privleak"] = _number(
            lambda *pair: metrics.privleak(metrics.auc(*pair), other, eps=eps),
            _attacked("min_k", tasks, None),
            num_resamples,
            seed,
        )
    return found


def column(rows: Rows, name: str) -> np.ndarray:
    """One column of the rows, [n] float64; None becomes NaN."""
    return np.asarray([row[name] for row in rows], np.float64)


def rows_of(tasks: Mapping[str, Rows], name: str) -> Rows:
    """The rows of a task, or one empty row if there is no such task."""
    return tasks.get(name) or [{}]


def _utility(tasks, num_resamples, seed) -> Number:
    columns = {
        name: [column(tasks[name], part) for part in parts]
        for name, parts in UTILITY.items()
    }
    broken = {name: np.isnan(np.stack(each)).any(0) for name, each in columns.items()}
    picked = [np.where(x, np.nan, np.arange(len(x))) for x in broken.values()]

    def utility(*drawn):
        scores = {}
        for (name, each), index in zip(columns.items(), drawn, strict=True):
            means = [float(x[index.astype(int)].mean()) for x in each]
            keys = ("probability", "rouge", "truth_ratio")
            scores[name] = dict(zip(keys, means, strict=True))
        return metrics.model_utility(scores)

    return _number(utility, picked, num_resamples, seed)


def _quality(forget: Rows, retrained: Rows) -> dict[str, Number]:
    pair = [column(rows, "truth_ratio") for rows in (forget, retrained)]
    pvalue = distance = math.nan
    if not any(np.isnan(x).any() for x in pair):
        pvalue, distance = metrics.forget_quality(*pair)
    rest = {"low": None, "high": None, "n": len(forget)}
    return {
        "forget_quality": {"value": pvalue, **rest},
        "forget_quality_distance": {"value": distance, **rest},
    }


def _attacked(attack, tasks, retrained) -> list[np.ndarray] | None:
    """The attack's scores of the forget rows and of the holdout rows."""
    kinds = ("forget", "holdout")
    if attack == "reference":
        if not retrained or not set(kinds) <= set(retrained):
            return None
        return [
            np.asarray(
                metrics.mia_reference(
                    column(tasks[kind], "nll"), column(retrained[kind], "nll")
                ),
                np.float64,
            )
            for kind in kinds
        ]
    name = f"mia_{attack}"
    if any(name not in tasks[kind][0] for kind in kinds):
        return None
    return [column(tasks[kind], name) for kind in kinds]


def _perplexity(nll, tokens) -> float:
    mean = float((nll * tokens).sum() / tokens.sum())
    return math.exp(mean) if mean < 700 else math.inf


def _number(
    statistic: Callable[..., float], samples, num_resamples: int, seed: int
) -> Number:
    count = sum(len(x) for x in samples)
    bad = sum(int(np.isnan(x).sum()) for x in samples)
    if bad:
        return {"value": math.nan, "low": None, "high": None, "n": count - bad}
    key = jax.random.key(seed)
    found = metrics.bootstrap(statistic, *samples, key=key, resamples=num_resamples)
    return {**found._asdict(), "n": count}
