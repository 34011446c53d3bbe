# SPDX-License-Identifier: Apache-2.0
"""NPO, SimNPO and DPO, alone and with a retain term."""

from functools import partial

from golden_families import reading
from jaxunlearn import losses


def npo(case, x):
    """gamma * NPO on summed log-probabilities + alpha * retain."""
    beta = case["hyperparameters"]["beta"]

    def forget(x):
        ref_logps = reading.answer_logps(x, "forget", ref=True)
        logps = reading.answer_logps(x, "forget")
        return losses.npo(logps, ref_logps, beta=beta).mean()

    return reading.with_retain(case, x, forget)


def simnpo(case, x):
    """gamma * SimNPO + alpha * retain. OpenUnlearning counts unshifted labels."""
    given = case["hyperparameters"]
    loss = partial(losses.simnpo, beta=given["beta"], delta=given["delta"])

    def forget(x):
        lengths = (x["forget_labels"] != reading.IGNORE).sum(-1)
        return loss(reading.answer_logps(x, "forget"), lengths).mean()

    return reading.with_retain(case, x, forget)


def dpo(case, x):
    """gamma * DPO (alternate over forget, where there is a forget answer) + retain."""
    beta = case["hyperparameters"]["beta"]
    parts = [part for part in ("alternate", "forget") if f"{part}_logits" in x]

    def forget(x):
        pairs = [
            reading.answer_logps(x, part, ref=ref)
            for part in parts
            for ref in (False, True)
        ]
        return losses.dpo(*pairs, beta=beta, compat="openunlearning").mean()

    return reading.with_retain(case, x, forget)
