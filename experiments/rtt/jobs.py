# SPDX-License-Identifier: Apache-2.0
"""An attack of RTT, and what the two worlds share to carry it out."""

from typing import NamedTuple

import numpy as np
import optax

from jaxunlearn import evaluate
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

ADAM = optax.scale_by_adam()


class Job(NamedTuple):
    """One attack.

    Attributes:
        of: the set of facts.
        who: the attacked model.
        fold: the fold held out.
        seed: of unlearning and of the attack.
        method: that unlearned the model, None for one that no method changed.
    """

    of: str
    who: str
    fold: int
    seed: int
    method: str | None = None

    @property
    def key(self) -> str:
        return f"rtt {self.of} {self.who} {self.seed} {self.fold}"


def option_logps(
    model: Model, params: Params, columns: table.Table, *, batch_size: int
) -> np.ndarray:
    """[n, k] log-probability of every choice, nats, summed over its tokens.

    Args:
        model, params: what is scored.
        columns: of attacks.encode_questions.
        batch_size: questions at a time.
    """
    columns, found = {k: x for k, x in columns.items() if k != "right"}, []
    for batch in table.eval_batches(columns, batch_size):
        valid = batch.pop("valid")
        each = evaluate.choice_logps(model, params, batch)
        found.append(np.asarray(each)[valid])
    return np.concatenate(found)
