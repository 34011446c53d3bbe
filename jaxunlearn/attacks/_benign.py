# SPDX-License-Identifier: Apache-2.0
"""Benign finetuning: finetuning on text that is unrelated to the forget set.

It needs no adversary. Users who finetune a model for another task may undo shallow
unlearning by accident (Hu et al., "Unlearning or obfuscating?", arXiv 2406.13356).
"""

from typing import Any

import numpy as np

from jaxunlearn.attacks._relearn import relearn
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model, Params


def benign(
    model: Model,
    params: Params,
    unrelated: tables.Table,
    *,
    forget: tables.Table | None = None,
    **settings: Any,
) -> tuple[Params, list[dict]]:
    """Finetunes the attacked model on unrelated text.

    The attacker needs the weights, and knows nothing about the forget set. If forgotten
    answers come back, they were hidden, not removed.

    Args:
        model, params: the attacked model; params are not changed.
        unrelated: table of text, such as that of data.encode_text.
        forget: table of the forget set. If given, `unrelated` must have none of its
            rows, because training on them would be relearning.
        settings: as for `relearn`; `steps` is required.
    Returns:
        (params after the attack, log).
    Raises:
        ValueError: if `unrelated` has no row, or has a row of `forget` (the first is
            named).
    References: https://arxiv.org/abs/2406.13356
    """
    if forget is not None:
        forgotten = set(_texts(forget))
        both = [row for row, text in enumerate(_texts(unrelated)) if text in forgotten]
        if both:
            raise ValueError(
                "attacks.benign needs unrelated text without rows of forget, got "
                f"{len(both)} such rows, the first is row {both[0]}. Remove them, or "
                "use attacks.relearn."
            )
    return relearn(model, params, unrelated, **settings)


def _texts(table):
    """The real tokens of every row."""
    pairs = zip(np.asarray(table["tokens"]), np.asarray(table["mask"]), strict=True)
    return [tuple(tokens[mask].tolist()) for tokens, mask in pairs]
