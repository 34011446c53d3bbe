# SPDX-License-Identifier: Apache-2.0
"""Losses: arrays to values that are not averaged. Pure maths; no model in sight.

| loss | reads | pushes | source |
| --- | --- | --- | --- |
| `nll` | log-probabilities of targets | towards the targets | maximum likelihood |
| `ascent` | the same | away from the targets, without bound | gradient ascent |
| `npo` | sequence and reference log-probabilities | away, less and less | 2404.05868 |
| `simnpo` | sequence log-probabilities and lengths | away, less and less | 2410.07163 |
| `npo_logits` | logits and reference logits | as MUSE's code does | 2407.06460 |
| `kl` | logits and reference logits | towards the reference | distillation |

`token_logps` turns logits into the log-probabilities that the first four read. Every
loss keeps the leading axes and returns float32 (float64 if float64 came in); reduce
outside, and divide by a count once.
"""

from jaxunlearn.losses._distill import kl
from jaxunlearn.losses._likelihood import ascent, nll, token_logps
from jaxunlearn.losses._preference import npo, npo_logits, simnpo

__all__ = ["ascent", "kl", "nll", "npo", "npo_logits", "simnpo", "token_logps"]
