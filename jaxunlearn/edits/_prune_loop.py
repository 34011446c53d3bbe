# SPDX-License-Identifier: Apache-2.0
"""Selective pruning in steps, until a stop rule holds."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.edits._prune import prune_units, select_units
from jaxunlearn.typing import Array, Model, Params


class Pruned(NamedTuple):
    """The result of `prune_loop`.

    Attributes:
        params: after the last step that respected the rules.
        removed: [N, units] bool, the units removed in them; None if no step did.
        history: (forget, retain) accuracy before the first step and after each step,
            including the step that broke a rule.
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
    max_retain_drop: float = 1.0,
    max_fraction: float = 1.0,
) -> Pruned:
    """Prunes a fraction of the site's units per step, with new scores for every step.

    Args:
        model: the model to prune.
        params: its parameters; they are not changed.
        scores: params -> [N, units], such as `unit_scores` of the activity; the units
            with the highest scores are removed.
        evaluate: params -> (forget accuracy, retain accuracy).
        site: the site whose units are pruned.
        fraction: of all units, per step, in (0, 1].
        max_retain_drop: the loop ends before a step that lowers the retain accuracy by
            more than this below its first value, in the unit of the accuracy.
        max_fraction: the loop ends before more than this fraction of all units is
            removed, in (0, 1].
    Returns:
        The pruned params, the removed units and the accuracies.
    Raises:
        ValueError: if a fraction is not in (0, 1] or less than one unit,
            max_retain_drop is negative, an accuracy is not finite, or scores are NaN.
    Paper and code: the released code has no stop rule; it prunes until the network is
        empty, and a step is chosen afterwards.
    References: https://arxiv.org/abs/2403.01267
    """
    owner = "prune_loop"
    _checks.positive(owner, fraction=fraction, max_fraction=max_fraction)
    _checks.not_negative(owner, max_retain_drop=max_retain_drop)
    if fraction > 1 or max_fraction > 1:
        raise ValueError(
            f"{owner} needs fractions of at most 1, got fraction={fraction} and "
            f"max_fraction={max_fraction}."
        )
    history = [_accuracies(owner, evaluate, params)]
    pruned, removed = params, None
    for step in range(1, int(max_fraction / fraction + 1e-6) + 1):
        gone = select_units(scores(pruned), fraction, removed=removed)
        if removed is None and not bool(jnp.any(gone)):
            raise ValueError(
                f"{owner} needs a fraction of at least one of {gone.size} units per "
                f"step, got fraction={fraction}."
            )
        trial = prune_units(model, params, {site: gone})
        history.append(_accuracies(owner, evaluate, trial))
        if history[0][1] - history[step][1] > max_retain_drop:
            break
        pruned, removed = trial, gone
    return Pruned(pruned, removed, tuple(history))


def _accuracies(owner, evaluate, params):
    forget, retain = (float(x) for x in evaluate(params))
    _checks.finite(owner, forget=forget, retain=retain)
    return forget, retain
