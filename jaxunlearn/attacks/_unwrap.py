# SPDX-License-Identifier: Apache-2.0
"""Taking off what lies beside the weights: whoever holds the file can leave it out."""

import re

from jaxunlearn import trees, wrap
from jaxunlearn.typing import Model, Params

BESIDE = rf"{wrap.LORA}|projection/.*"


def unwrap(model: Model, params: Params) -> tuple[Model, Params]:
    """The model and params without projections and low-rank products.

    An unlearning that lives in leaves beside the kernels, or in edits of the forward
    pass, is gone then; one that was merged or folded into kernels is not.

    Args:
        model: plain, or from wrap.lora or wrap.projection, or one around the other.
        params: with the leaves that those add.
    Returns:
        (the innermost model, the params without those leaves).
    Raises:
        ValueError: if there is nothing to take off.
    """
    inner = model
    while isinstance(getattr(inner.apply, "model", None), Model):
        inner = inner.apply.model
    found = [path for path in trees.paths(params) if re.fullmatch(BESIDE, path)]
    if not found and inner is model:
        raise ValueError(
            "attacks.unwrap needs a wrapped model, or params with leaves of wrap.lora "
            "or wrap.projection, got plain ones: there is nothing to take off."
        )
    return inner, _without(params, "")


def _without(node: Params, place: str) -> Params:
    if not isinstance(node, dict):
        return node
    kept = {}
    for key, value in node.items():
        path = f"{place}{key}"
        if re.fullmatch(BESIDE, path):
            continue
        value = _without(value, f"{path}/")
        if not isinstance(value, dict) or value:
            kept[key] = value
    return kept
