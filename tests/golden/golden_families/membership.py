# SPDX-License-Identifier: Apache-2.0
"""Membership inference: the attacks' scores, their AUC and PrivLeak. Run on the host,
as AUC and zlib do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from golden_families import reading
from jaxunlearn import losses, metrics

EPS = 1e-10
PARTS = ("forget", "holdout")


def attack(case, x):
    """Scores of both parts under the attack that the case's name begins with."""
    name = case["name"]
    kind = next(k for k in ATTACKS if re.fullmatch(rf"mia_{k}(_.*)?", name))
    score = functools.partial(ATTACKS[kind], case, x)
    scores = {
        part: np.asarray(jax.jit(score, static_argnums=0)(part)) for part in PARTS
    }
    return {
        **{f"{part}_score": value for part, value in scores.items()},
        **{f"{part}_mean": np.mean(value) for part, value in scores.items()},
        "auc": np.asarray(metrics.auc(*(scores[part] for part in PARTS))),
    }


def _loss(case, x, part, ref=False):
    logps, where = reading.answer_tokens(x, part, ref=ref)
    lengths = (x[f"{part}_labels"] != reading.IGNORE).sum(-1)
    return metrics.mia_loss(logps, where=where, lengths=lengths)


def _reference(case, x, part):
    pair = (_loss(case, x, part, ref=ref) for ref in (False, True))
    return metrics.mia_reference(*pair)


def _zlib(case, x, part):
    lengths = metrics.zlib_lengths(case["text"][part])
    return metrics.mia_zlib(_loss(case, x, part), lengths)


def _min_k(case, x, part):
    logps, where = reading.answer_tokens(x, part)
    where = metrics.drop_last(where)
    k = case["hyperparameters"]["k"]
    return metrics.mia_min_k(logps, k=k, where=where, empty=0.0)


def _min_k_plus_plus(case, x, part):
    targets = x[f"{part}_labels"][:, 1:]
    where = metrics.drop_last(targets != reading.IGNORE)
    k = case["hyperparameters"]["k"]
    logits = x[f"{part}_logits"][:, :-1]
    return metrics.mia_min_k_plus_plus(logits, targets, k=k, where=where, empty=0.0)


def _gradnorm(case, x, part):
    """The model is logits = embed[ids] @ head, one row at a time."""
    p = float(case["hyperparameters"]["p"])
    params = {name: x[name] for name in ("embed", "head")}

    def loss(params, ids, labels):
        logits = params["embed"][ids] @ params["head"]
        where = metrics.drop_last(labels[1:] != reading.IGNORE)
        logps = losses.token_logps(logits[:-1], labels[1:], where=where)
        return metrics.mean_nll(logps, where=where)

    def row(ids, labels):
        return metrics.mia_gradnorm(jax.grad(loss)(params, ids, labels), p=p)

    return jax.vmap(row)(x[f"{part}_input_ids"], x[f"{part}_labels"])


# The longer name first.
ATTACKS = {
    "loss": _loss,
    "reference": _reference,
    "zlib": _zlib,
    "min_k_plus_plus": _min_k_plus_plus,
    "min_k": _min_k,
    "gradnorm": _gradnorm,
}


def privleak(case, x):
    """Against the retrained model's AUC and against the default."""
    return _both(metrics.privleak, case, x)


def relative(case, x):
    """The relative difference of the areas as they are."""
    return _both(metrics.relative_difference, case, x)


def _both(function, case, x):
    auc, retain = float(x["auc"]), float(x["auc_retain"])
    default = case["hyperparameters"]["ref_value"]
    return {
        "value": function(auc, retain, eps=EPS),
        "value_default_ref": function(auc, default, eps=EPS),
    }


def muse(case, x):
    """MUSE's columns for texts of characters under a table of bigrams."""
    alphabet = {letter: i for i, letter in enumerate(case["alphabet"])}
    table = x["bigram_logits"]
    columns = case["columns"]

    everything = [text for texts in case["text"].values() for text in texts]
    longest = max(map(len, everything))

    def logps(texts):
        """[B, longest - 1] log-probabilities, and where a text has a token."""
        ids = [
            [alphabet[x] for x in text] + [0] * (longest - len(text)) for text in texts
        ]
        ids = jnp.asarray(ids)
        where = np.arange(1, longest) < np.array(list(map(len, texts)))[:, None]
        return losses.token_logps(table[ids[:, :-1]], ids[:, 1:], where=where), where

    @jax.jit
    def score():
        """[B, columns]."""
        scored, where = logps(everything)
        nll = metrics.mean_nll(scored, where=where)
        lower, lower_where = logps([text.lower() for text in everything])
        lower_nll = metrics.mean_nll(lower, where=lower_where)

        def column(name):
            if name == "PPL":
                return nll
            if name == "PPL/lower":
                return metrics.mia_lowercase(nll, lower_nll)
            if name == "PPL/zlib":
                return metrics.mia_zlib(nll, metrics.zlib_lengths(everything))
            k = float(re.fullmatch(r"Min-([\d.]+)%", name)[1]) / 100
            return metrics.mia_min_k(scored, k=k, where=where, min_tokens=0)

        return jnp.stack([column(name) for name in columns], axis=1)

    rows = np.asarray(score())
    ends = np.cumsum([len(texts) for texts in case["text"].values()])
    scores = dict(zip(case["text"], np.split(rows, ends[:-1]), strict=True))
    # 1 - auc: MUSE gives members the label 1, and its score is minus ours.
    areas = {
        f"forget_holdout_{name}": 1
        - metrics.auc(scores["forget"][:, i], scores["holdout"][:, i])
        for i, name in enumerate(columns)
    }
    given = case["hyperparameters"]
    leaks = {
        name.replace("auc_retrain", "privleak"): metrics.relative_difference(
            areas[given["auc_key"]], value
        )
        for name, value in given.items()
        if name.startswith("auc_retrain")
    }
    return {
        **{f"{part}_scores": value for part, value in scores.items()},
        "auc_forget_holdout": np.array([areas[key] for key in case["auc_keys"]]),
        **leaks,
    }
