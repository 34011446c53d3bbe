# SPDX-License-Identifier: Apache-2.0
"""Losses: arrays to values that are not averaged. Pure maths; no model in sight.

| loss | reads | pushes | source |
| --- | --- | --- | --- |
| `nll` | log-probabilities of targets | towards the targets | maximum likelihood |
| `ascent` | the same | away from the targets, without bound | gradient ascent |
| `wga` | the same, by token | away, known tokens most | 2502.19301 |
| `satimp` | the same, by token | away, tokens half known most | 2505.11953 |
| `npo` | sequence and reference log-probabilities | away, less and less | 2404.05868 |
| `simnpo` | sequence log-probabilities and lengths | away, less and less | 2410.07163 |
| `dpo` | those of two answers and references | from one to the other | 2305.18290 |
| `npo_logits` | logits and reference logits | as MUSE's code does | 2407.06460 |
| `kl`, `js` | logits and reference logits | towards the reference | distillation |
| `kl_uniform` | logits | towards knowing nothing | maximum entropy |
| `undial` | the same and targets | to the reference, target lowered | 2402.10052 |
| `ce_u` | logits and targets | to the same without the target | 2503.01224 |
| `complementary_ce` | logits and targets | to all classes but the target | 2407.18467 |
| `logit_margin` | logits | to equal logits (PDU) | 2506.05314 |
| `rmu` | hidden states and a target | towards the target | 2403.03218 |

`token_logps` turns logits into the log-probabilities that the first seven read;
`steering_vector` and `adaptive_target` make targets for `rmu`. Every loss keeps the
leading axes and returns float32 (float64 if float64 came in); reduce outside, and
divide by a count once. Random-label and incorrect-answer unlearning is `nll` on other
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
from jaxunlearn.losses._likelihood import ascent, nll, token_logps
from jaxunlearn.losses._preference import dpo, npo, npo_logits, simnpo
from jaxunlearn.losses._representation import adaptive_target, rmu, steering_vector
from jaxunlearn.losses._weighted import satimp, wga

__all__ = [
    "adaptive_target",
    "ascent",
    "ce_u",
    "complementary_ce",
    "dpo",
    "logit_margin",
    "js",
    "kl",
    "kl_uniform",
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
