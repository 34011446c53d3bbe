# SPDX-License-Identifier: Apache-2.0
"""Combiners: optax transformations from `{term: gradients}` to one update.

| combiner | update (g_k: gradient of term k) | source |
| --- | --- | --- |
| `weighted_sum` | sum of w_k g_k | GradDiff, LLM Surgery, MRP |
| `blur` | g_upper + (gamma - <g_upper, g_lower> / |g_lower|^2) g_lower | BLUR |
| `penalty` | g_upper + strength g_lower | penalty-based bi-level |
| `primal_dual` | w g_forget + mu g_retain; mu follows the retain loss | PDU |
| `pcgrad` | sum of the g_k, each projected where it opposes another | Yu et al. 2020 |
| `mgda` | shortest convex combination of the g_k | Sener and Koltun 2018 |
| `agree` | g_upper + g_lower where it has the sign of the averaged g_upper | MUDMAN |
| `collapse` | update of a chain, without leading directions of one g_k | RepSelect |
| `adam_metric` | update of a chain; `blur` uses the metric of its Adam | - |
| `saliency` | update of a chain, masked to large forget gradients | SURE |

Put the combiner first in a chain, before clipping and the optimizer:

    tx = optax.chain(
        combine.blur(gamma=0.1), optax.clip_by_global_norm(1.0), optax.adamw(1e-5)
    )
    state = tx.init(params)
    updates, state = tx.update({"forget": g_f, "retain": g_r}, state, params)

The state of a combiner has the fields `count` (steps taken) and `stats` (float32
scalars of the last step). Weights, gamma and strength may be schedules, functions of
`count`. Projections are not linear: accumulate the gradient of each term over
microbatches and devices before the combiner. For the same reason do not wrap a combiner
in `optax.MultiSteps`.

`with_rounding` wraps a chain, its combiner included, for params that are stored in
bfloat16 or float16. `with_moments` stores the optimizer's moments in bfloat16 or in 8
bits.
"""

from jaxunlearn.combine._agree import AgreeState, agree
from jaxunlearn.combine._blur import BlurState, blur
from jaxunlearn.combine._collapse import CollapseState, collapse
from jaxunlearn.combine._conflict import ConflictState, mgda, pcgrad
from jaxunlearn.combine._metric import adam_metric
from jaxunlearn.combine._moments import MOMENTS, MomentsState, with_moments
from jaxunlearn.combine._penalty import PenaltyState, penalty
from jaxunlearn.combine._primal_dual import PrimalDualState, primal_dual
from jaxunlearn.combine._rounding import ROUNDINGS, RoundingState, with_rounding
from jaxunlearn.combine._saliency import ROWS, SaliencyState, saliency
from jaxunlearn.combine._weighted import WeightedSumState, weighted_sum

__all__ = [
    "MOMENTS",
    "ROUNDINGS",
    "ROWS",
    "AgreeState",
    "BlurState",
    "CollapseState",
    "ConflictState",
    "MomentsState",
    "PenaltyState",
    "PrimalDualState",
    "RoundingState",
    "SaliencyState",
    "WeightedSumState",
    "adam_metric",
    "agree",
    "blur",
    "collapse",
    "mgda",
    "pcgrad",
    "penalty",
    "primal_dual",
    "saliency",
    "weighted_sum",
    "with_moments",
    "with_rounding",
]
