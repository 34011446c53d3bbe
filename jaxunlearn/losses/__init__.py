# SPDX-License-Identifier: Apache-2.0
"""Losses: functions of arrays that return unreduced values and know no model.

| loss | input | minimising it | source |
| --- | --- | --- | --- |
| `nll` | target log-probabilities | raises the targets | maximum likelihood |
| `ascent` | target log-probabilities | lowers the targets, without bound | 2210.01504 |
| `wga` | token log-probabilities | lowers likely tokens most | 2502.19301 |
| `satimp` | token log-probabilities | lowers tokens of middle p most | 2505.11953 |
| `js_target` | token log-probabilities | raises the targets, bounded | 2509.02820 |
| `npo` | sequence, reference log-probs | lowers answers, saturates | 2404.05868 |
| `simnpo` | sequence log-probs, lengths | lowers answers, saturates | 2410.07163 |
| `dpo` | log-probs of two answers | prefers one answer to the other | 2305.18290 |
| `npo_logits` | logits, reference logits | is what MUSE's code does | 2407.06460 |
| `kl`, `js` | logits, reference logits | moves to the reference | distillation |
| `kl_uniform` | logits | moves to the uniform distribution | maximum entropy |
| `undial` | logits, reference, targets | lowers the target's logit | 2402.10052 |
| `ce_u` | logits, targets | removes the target's probability | 2503.01224 |
| `complementary_ce` | logits, targets | favours all other classes | 2407.18467 |
| `logit_margin` | logits | makes all logits equal (PDU) | 2506.05314 |
| `rmu` | hidden states, a target | moves states to the target | 2403.03218 |

`token_logps` turns logits into the log-probabilities that the first eight losses take.
`steering_vector` and `adaptive_target` make targets for `rmu`. Every loss keeps the
leading axes and returns float32 (float64 for float64 input). Reduce outside: sum, then
divide by the count once. Random-label and incorrect-answer unlearning is `nll` on other
answers.
"""

from jaxunlearn.losses._distill import (
    ce_u,
    complementary_ce,
    js,
    kl,
    kl_uniform,
    logit_margin,
    undial,
)
from jaxunlearn.losses._likelihood import ascent, js_target, nll, token_logps
from jaxunlearn.losses._preference import dpo, npo, npo_logits, simnpo
from jaxunlearn.losses._representation import adaptive_target, rmu, steering_vector
from jaxunlearn.losses._weighted import satimp, wga

__all__ = [
    "adaptive_target",
    "ascent",
    "ce_u",
    "complementary_ce",
    "dpo",
    "js",
    "js_target",
    "kl",
    "kl_uniform",
    "logit_margin",
    "nll",
    "npo",
    "npo_logits",
    "rmu",
    "satimp",
    "simnpo",
    "steering_vector",
    "token_logps",
    "undial",
    "wga",
]
