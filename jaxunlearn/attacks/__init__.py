# SPDX-License-Identifier: Apache-2.0
"""Attacks: what an adversary does, to see whether the forgetting is real.

| attack | does | gives | source |
| --- | --- | --- | --- |
| `rtt` | trains on some folds of facts, asks the others | `Sweep`s | 2410.08827 |
| `relearn` | finetunes on some forgotten facts | params | 2410.08827 |
| `benign` | finetunes on unrelated text | params | 2406.13356 |
| `few_shot` | puts a prefix and answered questions before each | answers | |
| `sample` | draws many answers of each; `leak_at_k` counts | answers | 2107.03374 |
| `steer` | moves states towards those of retained facts | a model | |
| `unwrap` | leaves out projections and LoRA beside the weights | model and params | |
| `invert_classes` | draws what a classifier holds to be a class | images | 2402.00195 |
| `prune` | removes units that answer to forgotten questions | params | 2403.01267 |

Rounding is `edits.quantize` and its like. For RTT, `make_folds`, `check_folds` and
`encode_facts` prepare facts, `recovery` and `best_accuracy` make numbers of its sweeps,
and `strongest` picks the unlearned model to attack.

MRP's four attackers are `relearn` of a projected model with every weight or with LoRA
(`rank=8, pattern=r"blocks/attention/[qv]/kernel"`), behind projections that stand
still; `relearn` of folded params, where nothing stands still; and `unwrap`.
"""

from jaxunlearn.attacks._benign import benign
from jaxunlearn.attacks._folds import check_folds, make_folds, rotation
from jaxunlearn.attacks._formats import encode_asked, encode_facts
from jaxunlearn.attacks._invert import invert_classes
from jaxunlearn.attacks._prompting import few_shot, in_context
from jaxunlearn.attacks._prune import prune
from jaxunlearn.attacks._recovery import best_accuracy, recovery, strongest
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
    "encode_asked",
    "encode_facts",
    "few_shot",
    "in_context",
    "invert_classes",
    "leak_at_k",
    "make_folds",
    "prune",
    "recovery",
    "relearn",
    "retrain",
    "rotation",
    "rtt",
    "sample",
    "steer",
    "strongest",
    "unwrap",
]
