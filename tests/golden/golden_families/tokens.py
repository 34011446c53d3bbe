# SPDX-License-Identifier: Apache-2.0
"""Losses with a weight or a teacher for each token: WGA, SatImp, UNDIAL, CE-U."""

from functools import partial

import jax.numpy as jnp

from golden_families import reading
from jaxunlearn import losses


def weighted(case, x):
    """gamma * WGA or SatImp (by its hyperparameters) + alpha * retain."""
    given = case["hyperparameters"]
    exponents = {k: given[k] for k in ("beta", "beta1", "beta2") if k in given}
    loss = partial(losses.satimp if "beta1" in given else losses.wga, **exponents)
    return reading.with_retain(case, x, lambda x: reading.token_mean(loss, x, "forget"))


def undial(case, x):
    """The mean over every position; label -100 lowers entry V - 100."""
    beta = case["hyperparameters"]["beta"]

    def forget(x):
        logits, ref = x["forget_logits"][:, :-1], x["ref_forget_logits"][:, :-1]
        labels = x["forget_labels"][:, 1:]
        targets = jnp.where(labels < 0, labels + logits.shape[-1], labels)
        return losses.undial(logits, ref, targets, beta=beta).mean()

    return reading.with_retain(case, x, forget)


def ce_u(case, x):
    """Mean over labelled tokens; the first few of each row are dropped first."""
    first = case["hyperparameters"]["ignore_first_n_answer_tokens"]

    def forget(x):
        labels = x["forget_labels"]
        labelled = labels != reading.IGNORE
        where = (labelled & (jnp.cumsum(labelled, axis=1) > first))[:, 1:]
        loss = losses.ce_u(x["forget_logits"][:, :-1], labels[:, 1:], where=where)
        return loss.sum() / where.sum().astype(loss.dtype)

    return reading.with_retain(case, x, forget)
