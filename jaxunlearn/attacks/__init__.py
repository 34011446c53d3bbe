# SPDX-License-Identifier: Apache-2.0
"""Attacks: test whether unlearned knowledge can be recovered.

| attack | what the attacker does | result | source |
| --- | --- | --- | --- |
| `rtt` | trains on some folds of facts; others are evaluated | `Sweep`s | 2410.08827 |
| `relearn` | finetunes on some forgotten facts | params | 2410.08827 |
| `benign` | finetunes on unrelated text | params | 2406.13356 |
| `few_shot` | prepends a prefix and answered questions | answers | |
| `sample` | draws many answers; see `leak_at_k` | answers | 2107.03374 |
| `steer` | moves hidden states towards those of retained facts | model and params | |
| `unwrap` | removes projections and LoRA leaves | model and params | |
| `invert_classes` | optimises images for a classifier's classes | images | 2402.00195 |
| `prune` | removes units specific to forgotten questions | params | 2403.01267 |

For attacks by quantization see `edits.quantize`, `gptq`, `awq` and `llm_int8`. For RTT,
`make_folds` and `check_folds` prepare folds of facts, `encode_facts` and
`encode_questions` turn facts into tables, `recovery` and `best_accuracy` summarise
sweeps, and `strongest_unlearning` chooses the unlearned model to attack.

To compare an unlearned model with the original, run the same attack on both: what it
recovers from the original model is the most it can recover.

MRP's four attackers are: `relearn` of a projected model with all weights, or with LoRA
(`rank=8, pattern=r"blocks/attention/[qv]/kernel"`), behind projections that do not
change; `relearn` of folded params, in which all weights train; and `unwrap`.
"""

from jaxunlearn.attacks._benign import benign
from jaxunlearn.attacks._folds import check_folds, make_folds
from jaxunlearn.attacks._formats import encode_facts, encode_questions
from jaxunlearn.attacks._invert import invert_classes
from jaxunlearn.attacks._prompting import few_shot, in_context
from jaxunlearn.attacks._prune import prune
from jaxunlearn.attacks._recovery import best_accuracy, recovery, strongest_unlearning
from jaxunlearn.attacks._relearn import relearn
from jaxunlearn.attacks._retrain import Sweep, retrain, rtt
from jaxunlearn.attacks._sampling import leak_at_k, sample
from jaxunlearn.attacks._steer import steer
from jaxunlearn.attacks._unwrap import unwrap

__all__ = [
    "Sweep",
    "benign",
    "best_accuracy",
    "check_folds",
    "encode_facts",
    "encode_questions",
    "few_shot",
    "in_context",
    "invert_classes",
    "leak_at_k",
    "make_folds",
    "prune",
    "recovery",
    "relearn",
    "retrain",
    "rtt",
    "sample",
    "steer",
    "strongest_unlearning",
    "unwrap",
]
