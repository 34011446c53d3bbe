# SPDX-License-Identifier: Apache-2.0
"""Ordinary finetuning as a recipe."""

from collections.abc import Mapping
from types import MappingProxyType

from jaxunlearn import combine
from jaxunlearn.recipes import _recipe
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.typing import Model

TRAIN = MappingProxyType({"train": 1.0})


def nll(
    model: Model,
    *,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    streams: Mapping[str, float] = TRAIN,
) -> Recipe:
    """Weighted token-mean NLL of one or several streams.

    Args:
        model: the model to train.
        learning_rate: AdamW's learning rate or schedule.
        weight_decay: decoupled.
        clip: largest norm of the gradient, or None.
        streams: names of streams and their weights.
    """
    tx = _recipe.chain(
        combine.weighted_sum(),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
    )
    return Recipe({"total": _recipe.retain_nll(model, streams)}, tx)
