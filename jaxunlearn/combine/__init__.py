# SPDX-License-Identifier: Apache-2.0
"""Combiners: from `{term: gradients}` to one update, as optax transformations.

| combiner | update (g_k: gradient of term k) | source |
| --- | --- | --- |
| `weighted_sum` | sum of w_k g_k | GradDiff, LLM Surgery, MRP |
| `blur` | g_upper + (gamma - <g_upper, g_lower> / |g_lower|^2) g_lower | BLUR |
| `penalty` | g_upper + strength g_lower | penalty-based bi-level |
| `primal_dual` | w g_forget + mu g_retain, mu follows the retain loss | PDU |
| `pcgrad` | sum of g_k, each without what opposes another | Yu et al. 2020 |
| `mgda` | the shortest convex mixture of g_k | Sener and Koltun 2018 |
| `adam_metric` | a chain's update, blur's products in its Adam's metric | - |
| `saliency` | another chain's update, where the forget gradient is large | SURE |

A combiner goes first in a chain and the rest of the optimizer follows, clipping too:

    tx = optax.chain(
        combine.blur(gamma=0.1), optax.clip_by_global_norm(1.0), optax.adamw(1e-5)
    )
    state = tx.init(params)
    updates, state = tx.update({"forget": g_f, "retain": g_r}, state, params)

Its state has the fields `count` (steps taken) and `stats` (float32 scalars of the last
step). Every rate may be a schedule, a function of `count`. Accumulate each term's
gradient over microbatches and devices before the combiner, as the projection is not
linear; for the same reason `optax.MultiSteps` around a combiner is wrong.
"""

from jaxunlearn.combine._blur import BlurState, blur
from jaxunlearn.combine._conflict import ConflictState, mgda, pcgrad
from jaxunlearn.combine._metric import adam_metric
from jaxunlearn.combine._penalty import PenaltyState, penalty
from jaxunlearn.combine._primal_dual import PrimalDualState, primal_dual
from jaxunlearn.combine._saliency import MODULES, ROWS, WEIGHTS, SaliencyState, saliency
from jaxunlearn.combine._weighted import WeightedSumState, weighted_sum

__all__ = [
    "MODULES",
    "ROWS",
    "WEIGHTS",
    "BlurState",
    "ConflictState",
    "PenaltyState",
    "PrimalDualState",
    "SaliencyState",
    "WeightedSumState",
    "adam_metric",
    "blur",
    "mgda",
    "pcgrad",
    "penalty",
    "primal_dual",
    "saliency",
    "weighted_sum",
]
