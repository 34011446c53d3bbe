# SPDX-License-Identifier: Apache-2.0
"""The largest step of an edit whose damage stays within a budget."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxunlearn import _checks
from jaxunlearn.typing import Params

_FACTOR = 8.0  # the largest change of the scale from one evaluation to the next
_RANGE = 1e9  # how far from `start` the scale is sought, as a factor


class LargestStep(NamedTuple):
    """What `largest_step` found.

    Attributes:
        params: the edited params.
        scale: the step's scale.
        divergence: that of `params`, at most the budget.
        trials: all (scale, divergence) that were evaluated, in order.
    """

    params: Params
    scale: float
    divergence: float
    trials: tuple[tuple[float, float], ...]


def largest_step(
    edit: Callable[[float], Params],
    divergence: Callable[[Params], float],
    budget: float,
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    max_evaluations: int = 30,
) -> LargestStep:
    """Searches the largest scale at which an edit does no more damage than `budget`.

        kernels, rest = trees.split(params, r".*/mlp/(gate|up|down)/kernel")
        gradient = stats.gradient(forget, kernels, batches, ju.Frozen(rest))
        update = edits.collapse(gradient, rank=48)  # of the loss to be raised
        found = edits.largest_step(
            lambda scale: trees.merge(edits.add(kernels, update, scale=scale), rest),
            evaluate.kl_from(model, params, prose),
            budget=0.01,
        )

    Of an edit whose divergence grows with the scale, it finds a scale with divergence
    in [(1 - tolerance) budget, budget]. The scale is bracketed, with factors of at most
    8, and then the bracket is narrowed. A small step of size a has a divergence of
    about c a^2, so the next scale is read off a power law through what was evaluated;
    where this narrows the bracket too slowly, its geometric middle is taken (bisection
    of the logarithm). Divergences that are not finite count as larger than the budget.

    Args:
        edit: scale -> edited params, such as edits.add, edits.perturb or
            edits.task_vector with the scale as its strength; scale 0 means no edit.
        divergence: params -> damage, >= 0, such as the KL divergence from the original
            on prose, nats per token.
        budget: largest divergence allowed, > 0.
        start: the first scale to try, > 0.
        tolerance: fraction of the budget that may stay unused, in (0, 1).
        max_evaluations: number of calls of `divergence` at most. If it is reached, the
            largest step found within the budget is returned.
    Returns:
        LargestStep.
    Raises:
        ValueError: if a setting is out of range; if even a step of start / 1e9 exceeds
            the budget, or none within `max_evaluations` is below it; or if a step of
            1e9 start is still below it, so that the edit has no effect.
    References: the search of https://arxiv.org/abs/2606.17168, which only bisects.
    """
    owner = "largest_step"
    _checks.positive(owner, budget=budget, start=start, tolerance=tolerance)
    _checks.positive_int(owner, max_evaluations=max_evaluations)
    if tolerance >= 1:
        raise ValueError(
            f"{owner} needs a tolerance in (0, 1), got tolerance={tolerance}."
        )
    trials: list[tuple[float, float]] = []
    best, below, above = None, None, None
    scale, last_width = start, math.inf
    while len(trials) < max_evaluations:
        params = edit(scale)
        found = float(divergence(params))
        trials.append((scale, found))
        if math.isfinite(found) and found <= budget:
            best, below = params, (scale, found)
            if found >= (1 - tolerance) * budget:
                break
        else:
            above = (scale, found)
        del params
        if below is None and scale <= start / _RANGE:
            break
        if above is None and scale >= start * _RANGE:
            raise ValueError(
                f"{owner} needs an edit whose divergence grows with the scale, got "
                f"{found:.3g} at scale {scale:.3g}, below the budget of {budget:g}. "
                "Check that the update is not zero."
            )
        scale, last_width = _next(below, above, budget, tolerance, last_width)
    if best is None:
        raise ValueError(
            f"{owner} needs a budget that a small step meets, got budget={budget:g} "
            f"and a divergence of {trials[-1][1]:.3g} at scale {trials[-1][0]:.3g}. "
            "Raise the budget, or lower start."
        )
    return LargestStep(best, *below, tuple(trials))


def _next(below, above, budget, tolerance, last_width) -> tuple[float, float]:
    """(the next scale, logarithmic width of the bracket) from the nearest trials."""
    target = (1 - tolerance / 2) * budget
    if below is None or above is None:
        scale, found = below or above
        factor = _FACTOR if below else 1 / _FACTOR
        if found > 0 and math.isfinite(found):
            power_law = (target / found) ** 0.5
            factor = min(max(power_law, 1 / _FACTOR), _FACTOR)
            # A step beyond the target, so that the bracket closes.
            factor *= 1.1 if below else 1 / 1.1
        return scale * factor, math.inf
    low, high = math.log(below[0]), math.log(above[0])
    width, middle = high - low, (low + high) / 2
    sound = below[1] > 0 and math.isfinite(above[1])
    if sound and width < 0.75 * last_width:
        a, b = math.log(below[1]), math.log(above[1])
        guess = low + width * (math.log(target) - a) / (b - a)
        middle = min(max(guess, low + 0.02 * width), high - 0.02 * width)
    return math.exp(middle), width
