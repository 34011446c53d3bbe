# SPDX-License-Identifier: Apache-2.0
"""Selective pruning, a little at a time, until a rule says stop."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.edits._prune import prune_units, select_units
from jaxunlearn.typing import Array, Model, Params


class Pruned(NamedTuple):
    """What `prune_loop` gives.

    Attributes:
        params: of the last step that kept the rules.
        removed: [N, units] bool, the units that are gone in them; None before any.
        history: (forget, retain) accuracy before and after each step that was scored,
            the one that broke a rule too.
    """

    params: Params
    removed: Array | None
    history: tuple[tuple[float, float], ...]


def prune_loop(
    model: Model,
    params: Params,
    scores: Callable[[Params], Array],
    evaluate: Callable[[Params], tuple[float, float]],
    *,
    site: str = "mlp",
    fraction: float = 0.02,
    retain_drop: float = 1.0,
    budget: float = 1.0,
) -> Pruned:
    """Prunes `fraction` of the site's units a step and scores what is left anew.

    Args:
        model: whose units go.
        params: its parameters, never changed.
        scores: params -> [N, units], highest first to go; `unit_scores` of activity.
        evaluate: params -> (forget accuracy, retain accuracy).
        site: of the units.
        fraction: of all units, a step, in (0, 1].
        retain_drop: the loop ends before retain accuracy is lower than at first by more
            than this, in accuracy's units.
        budget: it ends before more than this fraction of all units is gone.
    Raises:
        ValueError: if a fraction is not in (0, 1] or less than one unit, a drop is < 0,
            an accuracy is not finite, or scores are NaN.
    Paper and code: the released code has no stop rule; its runs go on to an empty
        network, and a point is picked afterwards.
    References: https://arxiv.org/abs/2403.01267
    """
    owner = "prune_loop"
    _checks.positive(owner, fraction=fraction, budget=budget)
    _checks.not_negative(owner, retain_drop=retain_drop)
    if fraction > 1 or budget > 1:
        raise ValueError(
            f"{owner} needs fractions of at most 1, got fraction={fraction} and "
            f"budget={budget}."
        )
    history = [_accuracies(owner, evaluate, params)]
    pruned, removed = params, None
    for step in range(1, int(budget / fraction + 1e-6) + 1):
        gone = select_units(scores(pruned), fraction, removed=removed)
        if removed is None and not bool(jnp.any(gone)):
            raise ValueError(
                f"{owner} needs a fraction of at least one of {gone.size} units a step,"
                f" got fraction={fraction}."
            )
        trial = prune_units(model, params, {site: gone})
        history.append(_accuracies(owner, evaluate, trial))
        if history[0][1] - history[step][1] > retain_drop:
            break
        pruned, removed = trial, gone
    return Pruned(pruned, removed, tuple(history))


def _accuracies(owner, evaluate, params):
    forget, retain = (float(x) for x in evaluate(params))
    _checks.finite(owner, forget=forget, retain=retain)
    return forget, retain
