# SPDX-License-Identifier: Apache-2.0
"""Terms: a loss bound to a model and to the streams it reads.

| term | its loss reads |
| --- | --- |
| `on_logps` | log-probabilities of answers, or of their tokens |
| `on_pairs` | log-probabilities of two answers to each question, in two streams |
| `on_tokens` | the logits of the whole vocabulary |
| `on_hidden` | hidden states after one layer, where the forward pass then stops |
| `load_balance` | how a mixture of experts distributes tokens |
| `halves` | splits a term into two, over even and odd rows (independent gradients) |
| `joint` | a weighted sum of such terms in one forward pass |
| `displaced` | a term at other parameters: `ascend`, `gaussian`, `descend`, ... |

A term returns the sum of its loss and the number of rows or tokens that count, so that
the division happens once, after microbatches and devices. The unembedding and the loss
run over a few tokens of every sequence at a time, and the backward pass computes those
logits again: no array of shape [B, L, V] ever exists.

The parameters of a loss name its inputs. The first parameter is what the model
computes. For `on_logps` every further positional parameter without a default is a
column: `ref_logps` and others are read from the batch, `lengths` is counted by the
term. For `on_tokens` it may be `ref_logits` or `targets`. A loss over tokens also takes
`where` (bool, True: the token counts). A loss returns one value a row or a token and
does not average. Hyperparameters are bound with functools.partial:

    terms.on_logps(partial(losses.npo, beta=0.1), model, "forget")
    terms.on_logps(losses.nll, model, "retain", reduce="token")
    terms.on_tokens(losses.kl, model, "retain")
    terms.on_hidden(losses.rmu, model, "forget", layer=7, target=vector)
"""

from jaxunlearn.terms._bound import BoundTerm, JointTerm, joint
from jaxunlearn.terms._chunks import target_logps, target_values
from jaxunlearn.terms._displaced import (
    DisplacedTerm,
    ascend,
    descend,
    displaced,
    gaussian,
    toward_reference,
)
from jaxunlearn.terms._halves import halves
from jaxunlearn.terms._hidden import on_hidden
from jaxunlearn.terms._load_balance import load_balance
from jaxunlearn.terms._logits import on_logps, on_pairs, on_tokens

__all__ = [
    "BoundTerm",
    "DisplacedTerm",
    "JointTerm",
    "ascend",
    "descend",
    "displaced",
    "gaussian",
    "halves",
    "joint",
    "load_balance",
    "on_hidden",
    "on_logps",
    "on_pairs",
    "on_tokens",
    "target_logps",
    "target_values",
    "toward_reference",
]
