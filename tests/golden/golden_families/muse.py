# SPDX-License-Identifier: Apache-2.0
"""The losses of MUSE's released code, which BLUR's MUSE runs share."""

from golden_families import reading
from jaxunlearn import losses


def loss(case, x):
    """forget + retain, as loss_type names them: (ga | npo) [_gdr | _klr]."""
    kind, beta = _hyperparameters(case)

    def total(x):
        value = _forget(kind, x, beta)
        rest = _retain(kind, x)
        return value if rest is None else value + rest

    value, grads = reading.with_gradients(total, x)
    return {"loss": value, **grads}


def two_losses(case, x):
    """The two levels separately, for BLUR."""
    kind, beta = _hyperparameters(case)
    values, grads = reading.with_gradients(
        lambda x: {"forget": _forget(kind, x, beta), "retain": _retain(kind, x)}, x
    )
    return {**{f"loss_{part}": value for part, value in values.items()}, **grads}


def _hyperparameters(case):
    given = case["hyperparameters"]
    return set(given["loss_type"].split("_")), given["beta"]


def _forget(kind, x, beta):
    if "npo" in kind:
        pair = x["forget_logits"], x["ref_forget_logits"]
        return losses.npo_logits(*pair, beta=beta).mean()
    if "ga" in kind:
        return reading.token_mean(losses.ascent, x, "forget")
    raise ValueError(f"loss_type names no forget loss among 'ga' and 'npo': {kind}.")


def _retain(kind, x):
    if "gdr" in kind:
        return reading.token_mean(losses.nll, x, "retain")
    if "klr" in kind:
        logits = x["retain_logits"]
        raw = losses.kl(logits, x["ref_retain_logits"], normalize=False)
        return raw.sum() / logits.shape[0]
    return None
