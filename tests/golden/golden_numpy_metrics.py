# SPDX-License-Identifier: Apache-2.0
"""Random golden cases of the metrics in plain NumPy and Python loops."""

import zlib

import golden_numpy
import numpy as np
from scipy import stats


def _labelled(part, x):
    """Per row: log-probabilities, hits and standardised scores of the labels."""
    logp = golden_numpy._log_softmax(x[f"{part}_logits"])
    rows = []
    for b, labels in enumerate(x[f"{part}_labels"]):
        each = []
        for t in np.flatnonzero(labels != -100):
            if t:
                at, label = logp[b, t - 1], labels[t]
                p = np.exp(at)
                mu = (p * at).sum()
                sd = np.sqrt(max((p * (at - mu) ** 2).sum(), 1e-6))
                each.append((at[label], at.argmax() == label, (at[label] - mu) / sd))
        rows.append(np.array(each, float).reshape(-1, 3))
    return rows


def _nll(part, x):
    counts = (x[f"{part}_labels"] != -100).sum(1)
    rows = _labelled(part, x)
    return np.array([-r[:, 0].sum() / n for r, n in zip(rows, counts, strict=True)])


def _probability(rng):
    x = golden_numpy._part(rng, "forget", 11)
    prob = np.exp(-_nll("forget", x))
    out = {"prob": prob, "avg_loss": -np.log(prob), "agg_value": prob.mean()}
    return {}, x, out


def _exact(rng):
    x = golden_numpy._part(rng, "forget", 3)
    score = np.array([r[:-1, 1].mean() if len(r) > 1 else np.nan for r in _rows(x)])
    return {}, x, {"score": score, "agg_value": np.nanmean(score)}


def _extraction(rng):
    x = golden_numpy._part(rng, "forget", 3)
    score = []
    for row in _rows(x):
        hits = row[:-1, 1]
        k = next((k for k in range(len(hits)) if hits[k:].all()), len(hits) - 1)
        score.append(1 - k / len(hits) if len(hits) else 0.0)
    return {}, x, {"score": np.array(score), "agg_value": np.mean(score)}


def _rows(x):
    return _labelled("forget", x)


def _attack(kind):
    def make(rng):
        x = {}
        for part in ("forget", "holdout"):
            x |= golden_numpy._part(rng, part, 7)
        k, text, scores = rng.uniform(0.1, 0.9), {}, {}
        for part in ("forget", "holdout"):
            rows, nll = _labelled(part, x), _nll(part, x)
            text[part] = ["".join(map(chr, ids + 97)) for ids in x[f"{part}_input_ids"]]
            if kind == "zlib":
                nll /= [len(zlib.compress(t.encode())) for t in text[part]]
            scores[part] = nll
            if kind.startswith("min_k"):
                column = 2 if kind == "min_k_plus_plus" else 0
                found = [np.sort(row[:-1, column]) for row in rows]
                scores[part] = np.array(
                    [
                        -f[: max(1, int(k * len(f)))].mean() if len(f) else 0
                        for f in found
                    ]
                )
        pairs = [
            (b > a) + 0.5 * (b == a)
            for a in scores["forget"]
            for b in scores["holdout"]
        ]
        out = {f"{part}_score": score for part, score in scores.items()}
        out |= {f"{part}_mean": score.mean() for part, score in scores.items()}
        return {"k": k}, x, {**out, "auc": np.mean(pairs)}, {"text": text}

    return make


def _ratio(kind):
    def make(rng):
        n, options = rng.integers(3, 9), rng.integers(1, 6)
        x = {
            "correct_avg_loss": rng.uniform(0, 3, n),
            "wrong_avg_loss": rng.uniform(0, 3, (n, options)),
        }
        c, w = np.exp(-x["correct_avg_loss"]), np.exp(-x["wrong_avg_loss"].mean(1))
        score = c / (c + w + 1e-10) if kind == "prob_mean" else w / (c + 1e-10)
        value = {
            "prob_mean": score,
            "true_better": np.maximum(0, 1 - score),
            "closer_to_1_better": np.minimum(score, 1 / (score + 1e-10)),
        }[kind]
        return {"aggregator": kind}, x, {"score": score, "agg_value": value.mean()}

    return make


def _quality(rng):
    sizes = rng.integers(5, 30, 2)
    x = dict(
        zip(
            ("model_truth_ratio", "retain_truth_ratio"),
            (
                rng.lognormal(shift, 1, n)
                for shift, n in zip((0, 1), sizes, strict=True)
            ),
            strict=True,
        )
    )
    return {}, x, {"pvalue": stats.ks_2samp(*x.values()).pvalue}


def _class(rng):
    logits = rng.normal(size=(rng.integers(2, 6), rng.integers(2, 5)))
    class_id = int(rng.integers(logits.shape[1]))
    score = np.exp(golden_numpy._log_softmax(logits))[:, class_id]
    out = {"score": score, "agg_value": score.mean()}
    return {"class_id": class_id}, {"classifier_logits": logits}, out


def _areas(flip):
    def make(rng):
        auc, retain, default = rng.uniform(0.1, 0.9, 3)
        s, r, d = (1 - v if flip else v for v in (auc, retain, default))
        out = {"value": 100 * (s - r) / r, "value_default_ref": 100 * (s - d) / d}
        return {"ref_value": default}, {"auc": auc, "auc_retain": retain}, out

    return make


CASES = {
    "probability": _probability,
    "exact_memorization": _exact,
    "extraction_strength": _extraction,
    **{f"mia_{k}": _attack(k) for k in ("loss", "zlib", "min_k", "min_k_plus_plus")},
    **{
        f"truth_ratio_{k}": _ratio(k)
        for k in ("prob_mean", "true_better", "closer_to_1_better")
    },
    "forget_quality_ks": _quality,
    "classifier_prob": _class,
    "privleak": _areas(True),
    "rel_diff": _areas(False),
}
