# SPDX-License-Identifier: Apache-2.0
"""What a recipe is, and the pieces that recipes share."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import optax

from jaxunlearn import _checks, combine, losses, terms
from jaxunlearn.typing import Model, Term

Rate = float | optax.Schedule


class Recipe(NamedTuple):
    """A method ready to run: `init_state(train, tx, key)`, `make_step(terms, tx)`.

    Attributes:
        terms: what make_step differentiates.
        tx: combiner, clipping and optimizer in one chain.
        trainable: pattern for trees.split, the leaves (or layers of them) that train.
    """

    terms: Mapping[str, Term]
    tx: optax.GradientTransformationExtraArgs
    trainable: str = r".*"


def chain(
    combiner: optax.GradientTransformationExtraArgs,
    *,
    learning_rate: Rate,
    weight_decay: float,
    clip: float | None,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """combiner -> clip by global norm -> AdamW, the order BLUR's projection needs."""
    links = [] if clip is None else [optax.clip_by_global_norm(clip)]
    adamw = optax.adamw(learning_rate, eps=eps, weight_decay=weight_decay)
    return optax.chain(combiner, *links, adamw)


def retain_nll(model: Model, retain: Mapping[str, float]) -> Term:
    """Weighted token-mean NLL of one or several retain streams, as one term."""
    parts = retain_parts(model, retain)
    if len(parts) == 1 and set(retain.values()) == {1.0}:
        return next(iter(parts.values()))
    return terms.joint(parts, retain)


def forget_npo(model: Model, *, beta: float) -> terms.BoundTerm:
    """NPO on the stream `forget`, whose batches carry `ref_logps`."""
    return terms.on_logps(partial(losses.npo, beta=beta), model, "forget")


def weighted(
    parts: Mapping[str, terms.BoundTerm],
    weights: Mapping[str, float],
    *,
    learning_rate: Rate,
    weight_decay: float,
    clip: float | None,
    eps: float = 1e-8,
    trainable: str = r".*",
) -> Recipe:
    """One joint term of weighted parts -> clip -> AdamW."""
    total = terms.joint(parts, weights)
    rest = dict(
        learning_rate=learning_rate, weight_decay=weight_decay, clip=clip, eps=eps
    )
    tx = chain(combine.weighted_sum(), **rest)
    return Recipe({"total": total}, tx, trainable)


def retain_parts(
    model: Model, retain: Mapping[str, float], kind: str = "nll"
) -> dict[str, terms.BoundTerm]:
    """A term for each retain stream: "nll" of its answers, or "kl" to the reference."""
    _checks.one_of("The recipe", ("nll", "kl"), retain_loss=kind)
    if kind == "kl":
        return {name: terms.on_tokens(losses.kl, model, name) for name in retain}
    return {
        name: terms.on_logps(losses.nll, model, name, reduce="token") for name in retain
    }


def layers(model: Model, wanted: Sequence[int]) -> tuple[int, ...]:
    """The layers as a rising tuple, once the model has a site for each of them."""
    wanted = tuple(sorted(wanted))
    if "block" not in model.sites:
        raise ValueError(
            "This recipe reads the output of a block and needs a model with the site "
            f"'block', got sites {_checks.listed(model.sites)}. Use models.make."
        )
    count = model.sites["block"].layers
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < count:
        raise ValueError(
            f"This recipe needs layers from 0 to {count - 1}, got layers={wanted}. "
            "Pass layers=(...) for a model of another depth than the paper's."
        )
    return wanted
