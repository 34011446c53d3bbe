# SPDX-License-Identifier: Apache-2.0
"""RMU, on the hidden states of one layer."""

import jax.numpy as jnp

from golden_families import reading
from jaxunlearn import losses


def rmu(case, x):
    """gamma * forget to the control vector + alpha * retain (EMBED_DIFF or NLL)."""
    given = case["hyperparameters"]
    kind = given["retain_loss_type"]

    def parts(x):
        forget = _openunlearning(
            x["forget_acts"], x["control_vec"], _labelled(x, "forget")
        )
        if kind == "EMBED_DIFF":
            ref = x["ref_retain_acts"]
            return forget, _openunlearning(
                x["retain_acts"], ref, _labelled(x, "retain")
            )
        return forget, reading.retain(kind, x)

    def total(x):
        forget, retain = parts(x)
        return given["gamma"] * forget + given["alpha"] * retain

    loss, grads = reading.with_gradients(total, x)
    forget, retain = parts(x)
    return {"loss": loss, "forget_loss": forget, "retain_loss": retain, **grads}


def activation(case, x):
    """OpenUnlearning's activation loss alone."""
    del case
    return {"loss": _openunlearning(x["acts"], x["target"], x["mask"] != 0)}


def _labelled(x, part):
    return x[f"{part}_labels"] != reading.IGNORE


def _openunlearning(hidden, target, where):
    """mean_b(sum of row b) * mean_b(1 / tokens of row b), as in OpenUnlearning."""
    rows = losses.rmu(hidden, target, where=where).sum(-1)
    counts = where.sum(-1).astype(rows.dtype)
    return rows.mean() * jnp.mean(1 / counts)
