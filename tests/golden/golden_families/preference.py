# SPDX-License-Identifier: Apache-2.0
"""NPO and SimNPO, alone and with a retain term."""

from functools import partial

from golden_families import reading
from jaxunlearn import losses


def npo(case, x):
    """gamma * NPO on summed log-probabilities + alpha * retain."""
    beta = case["hyperparameters"]["beta"]

    def forget(x):
        ref_logps = reading.answer_logps(x, "forget", ref=True)
        return losses.npo(reading.answer_logps(x, "forget"), ref_logps, beta=beta)

    return _with_retain(case, x, forget)


def simnpo(case, x):
    """gamma * SimNPO + alpha * retain. The peer's length counts unshifted labels."""
    given = case["hyperparameters"]
    loss = partial(losses.simnpo, beta=given["beta"], delta=given["delta"])

    def forget(x):
        lengths = (x["forget_labels"] != reading.IGNORE).sum(-1)
        return loss(reading.answer_logps(x, "forget"), lengths)

    return _with_retain(case, x, forget)


def _with_retain(case, x, forget):
    given = case["hyperparameters"]
    kind = given.get("retain_loss_type")

    def total(x):
        loss = given.get("gamma", 1.0) * forget(x).mean()
        if kind is not None:
            loss = loss + given.get("alpha", 1.0) * reading.retain(kind, x)
        return loss

    loss, grads = reading.with_gradients(total, x)
    return {"loss": loss, **grads}
