# SPDX-License-Identifier: Apache-2.0
"""What a recipe is, and the pieces that recipes share."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import optax

from jaxunlearn import losses, terms
from jaxunlearn.typing import Model, Term

Rate = float | optax.Schedule


class Recipe(NamedTuple):
    """A method ready to run: `init_state(train, tx, rng)`, `make_step(terms, tx)`.

    Attributes:
        terms: what make_step differentiates.
        tx: combiner, clipping and optimizer in one chain.
        trainable: pattern for trees.split, the leaves that train.
    """

    terms: Mapping[str, Term]
    tx: optax.GradientTransformationExtraArgs
    trainable: str = r".*"


def chain(
    combiner: optax.GradientTransformationExtraArgs,
    *,
    lr: Rate,
    weight_decay: float,
    clip: float | None,
) -> optax.GradientTransformationExtraArgs:
    """combiner -> clip by global norm -> AdamW, the order BLUR's projection needs."""
    links = [] if clip is None else [optax.clip_by_global_norm(clip)]
    return optax.chain(combiner, *links, optax.adamw(lr, weight_decay=weight_decay))


def retain_nll(model: Model, retain: Mapping[str, float]) -> Term:
    """Weighted token-mean NLL of one or several retain streams, as one term."""
    parts = {
        name: terms.on_logps(losses.nll, model, name, reduce="token") for name in retain
    }
    if len(parts) == 1 and set(retain.values()) == {1.0}:
        return next(iter(parts.values()))
    return terms.joint(parts, retain)


def forget_npo(model: Model, *, beta: float) -> terms.BoundTerm:
    """NPO on the stream `forget`, whose batches carry `ref_logps`."""
    return terms.on_logps(partial(losses.npo, beta=beta), model, "forget")
