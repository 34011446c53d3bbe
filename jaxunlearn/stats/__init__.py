# SPDX-License-Identifier: Apache-2.0
"""Statistics of a model on data: activity of units, importance of weights, gradients.

    forget = stats.activity(model, params, forget_batches)["mlp"]
    retain = stats.activity(model, params, retain_batches)["mlp"]
    scores = edits.unit_scores(forget=forget.abs, retain=retain.abs)

Padding is ignored. The units of the site `mlp` are the inputs of the down projection
(in gated MLPs the product); those of `attention` are the inputs of the output
projection.
"""

from jaxunlearn.stats._activity import Activity, Moments, activity, moments, pooled
from jaxunlearn.stats._gradients import fisher, gradient

__all__ = [
    "Activity",
    "Moments",
    "activity",
    "fisher",
    "gradient",
    "moments",
    "pooled",
]
