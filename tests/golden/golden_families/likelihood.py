# SPDX-License-Identifier: Apache-2.0
"""Likelihood and KL, alone and as gradient ascent with a retain term."""

from golden_families import reading
from jaxunlearn import losses


def batch_nll(case, x):
    """NLL of each row, summed over its tokens."""
    nll, grads = reading.with_gradients(
        lambda x: losses.nll(reading.answer_logps(x, "forget")), x
    )
    return {"nll": nll, **grads}


def kl_retain(case, x):
    """KL(reference || model), mean over every position."""
    loss, grads = reading.with_gradients(lambda x: reading.retain("KL", x), x)
    return {"loss": loss, **grads}


def grad_diff(case, x):
    """gamma * ascent + alpha * retain; without a retain loss type, ascent alone."""
    return reading.with_retain(
        case, x, lambda x: reading.token_mean(losses.ascent, x, "forget")
    )


def tofu(case, x):
    """The older TOFU repository: unit weights, chosen by loss_type."""
    kinds = {"grad_ascent": None, "grad_diff": "NLL", "KL": "KL"}
    kind = case["hyperparameters"]["loss_type"]
    if kind not in kinds:
        raise ValueError(f"No TOFU loss is called {kind!r}; there are {list(kinds)}.")
    if kinds[kind] is None:
        return grad_diff({"hyperparameters": {}}, x)
    return grad_diff({"hyperparameters": {"retain_loss_type": kinds[kind]}}, x)
