# SPDX-License-Identifier: Apache-2.0
"""Unwrapping: removes projections and LoRA, which are separate leaves of the params."""

import re

from jaxunlearn import trees, wrap
from jaxunlearn.typing import Model, Params

ADDED = rf"{wrap.LORA}|projection/.*"


def unwrap(model: Model, params: Params) -> tuple[Model, Params]:
    """Removes projections and LoRA from a model and its params.

    The attacker only needs the params. Unlearning that consists of such leaves, or of
    edits of the forward pass, is undone; unlearning that was merged or folded into
    kernels is not.

    Args:
        model: a model of wrap.lora or wrap.projection, both nested, or a plain model.
        params: with the leaves that these add.
    Returns:
        (the innermost model, the params without those leaves).
    Raises:
        ValueError: if there is nothing to remove.
    """
    inner = model
    while isinstance(getattr(inner.apply, "model", None), Model):
        inner = inner.apply.model
    found = [path for path in trees.paths(params) if re.fullmatch(ADDED, path)]
    if not found and inner is model:
        raise ValueError(
            "attacks.unwrap needs a wrapped model, or params with leaves of wrap.lora "
            "or wrap.projection, got neither. Folded and merged params cannot be "
            "unwrapped."
        )
    return inner, _without(params, "")


def _without(node: Params, prefix: str) -> Params:
    """The tree without leaves that match ADDED and without empty subtrees."""
    if not isinstance(node, dict):
        return node
    kept = {}
    for key, value in node.items():
        path = f"{prefix}{key}"
        if re.fullmatch(ADDED, path):
            continue
        value = _without(value, f"{path}/")
        if not isinstance(value, dict) or value:
            kept[key] = value
    return kept
