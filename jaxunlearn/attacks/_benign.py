# SPDX-License-Identifier: Apache-2.0
"""Finetuning on text that has nothing to do with what was forgotten.

No attacker is needed: whoever adapts a model to a task of their own may undo a thin
unlearning on the way (Hu et al., "Unlearning or obfuscating?", arXiv 2406.13356).
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
    """Finetunes on unrelated text.

    Args:
        model, params: who is attacked; params are left as they are.
        unrelated: table of text, such as data.encode_text makes.
        forget: what was forgotten; if given, a row of it among `unrelated` is refused,
            as this would be relearning.
        settings: as for relearn; `steps` is needed.
    Returns:
        (params after the attack, log).
    Raises:
        ValueError: if `unrelated` has no rows, or one of `forget`, saying which.
    References: https://arxiv.org/abs/2406.13356
    """
    if forget is not None:
        taken = set(_texts(forget))
        both = [row for row, text in enumerate(_texts(unrelated)) if text in taken]
        if both:
            raise ValueError(
                "attacks.benign needs text that was not to be forgotten, but "
                f"{len(both)} rows of it are in `forget`, the first of them row "
                f"{both[0]}. Take them out, or call attacks.relearn."
            )
    return relearn(model, params, unrelated, **settings)


def _texts(table):
    """Every row's real tokens."""
    pairs = zip(np.asarray(table["tokens"]), np.asarray(table["mask"]), strict=True)
    return [tuple(tokens[mask].tolist()) for tokens, mask in pairs]
