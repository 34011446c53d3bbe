# SPDX-License-Identifier: Apache-2.0
"""The methods of OpenUnlearning as weighted sums, with that project's defaults.

Each minimises gamma * forget + alpha * retain; gamma weighs the forget loss here, as in
that project's configurations. The two losses merely add, so they are one joint term:
one forward pass over both streams and one gradient tree. Retain is the token-mean NLL.
"""

from collections.abc import Mapping
from functools import partial

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.recipes.blur import RETAIN
from jaxunlearn.typing import Model


def ascent(
    model: Model,
    *,
    lr: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> Recipe:
    """GradAscent: minus the token-mean NLL of `forget` and nothing that retains."""
    forget = terms.on_logps(losses.ascent, model, "forget", reduce="token")
    return _sum(forget, 1.0, {}, lr, weight_decay, clip)


def graddiff(
    model: Model,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    lr: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """GradDiff: ascent on `forget`, NLL on the retain streams."""
    forget = terms.on_logps(losses.ascent, model, "forget", reduce="token")
    parts = _retain(model, retain, alpha)
    return _sum(forget, gamma, parts, lr, weight_decay, clip)


def npo(
    model: Model,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    lr: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """NPO on `forget` (with `ref_logps`), NLL on the retain streams."""
    forget = _recipe.forget_npo(model, beta=beta)
    parts = _retain(model, retain, alpha)
    return _sum(forget, gamma, parts, lr, weight_decay, clip)


def simnpo(
    model: Model,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    gamma: float = 0.125,
    alpha: float = 1.0,
    lr: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """SimNPO on `forget` (needs no reference), NLL on the retain streams."""
    loss = partial(losses.simnpo, beta=beta, delta=delta)
    forget = terms.on_logps(loss, model, "forget")
    parts = _retain(model, retain, alpha)
    return _sum(forget, gamma, parts, lr, weight_decay, clip)


def _retain(model: Model, retain: Mapping[str, float], alpha: float):
    return {
        name: (
            alpha * weight,
            terms.on_logps(losses.nll, model, name, reduce="token"),
        )
        for name, weight in retain.items()
    }


def _sum(forget, gamma, retain, lr, weight_decay, clip) -> Recipe:
    parts = {"forget": forget} | {name: term for name, (_, term) in retain.items()}
    weights = {"forget": gamma} | {name: weight for name, (weight, _) in retain.items()}
    total = terms.joint(parts, weights)
    tx = _recipe.chain(
        combine.weighted_sum(), lr=lr, weight_decay=weight_decay, clip=clip
    )
    return Recipe({"total": total}, tx)
