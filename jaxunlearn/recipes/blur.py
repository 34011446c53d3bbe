# SPDX-License-Identifier: Apache-2.0
"""BLUR: bi-level unlearning, forgetting first (arXiv 2506.08164).

min r(theta) over the minimisers of f(theta): each step moves along

    u = g_r + (gamma - <g_r, g_f> / |g_f|^2) g_f,    so that <u, g_f> = gamma |g_f|^2

with f the forget loss, r the retain loss. Numbers come from the authors' TOFU code.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import optax

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe, _rmu
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.typing import Model

RETAIN = MappingProxyType({"retain": 1.0})


def npo(
    model: Model,
    *,
    beta: float = 0.1,
    gamma: float | optax.Schedule = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.01,
    clip: float | None = None,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """BLUR with NPO below and NLL above.

    gamma decides more than anything else: 1.0 is the authors' number, and where forget
    and retain gradients conflict it can cost the retained facts too. The quickstart
    takes 0.2.

    Args:
        model: the model to unlearn.
        beta: NPO's inverse temperature.
        gamma: how far the forget loss goes down at each step, >= 0.
        learning_rate: AdamW's learning rate or schedule.
        weight_decay: decoupled, after the projection.
        clip: largest norm of the projected update; None as in the paper.
        retain: retain streams and their weights; their sum is one upper level.
    Returns:
        A Recipe on the streams `forget` (with `ref_logps`) and those of `retain`.
    """
    parts = {
        "forget": _recipe.forget_npo(model, beta=beta),
        "retain": _recipe.retain_nll(model, retain),
    }
    combiner = combine.blur(upper="retain", lower="forget", gamma=gamma)
    return Recipe(
        parts,
        _recipe.chain(
            combiner, learning_rate=learning_rate, weight_decay=weight_decay, clip=clip
        ),
    )


def graddiff(
    model: Model,
    *,
    gamma: float | optax.Schedule = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.01,
    clip: float | None = None,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """BLUR with gradient ascent below and NLL above; arguments as for `npo`.

    Ascent has no minimum, so BLUR's guarantee does not cover it: stop early.
    """
    parts = {
        "forget": terms.on_logps(losses.ascent, model, "forget", reduce="token"),
        "retain": _recipe.retain_nll(model, retain),
    }
    combiner = combine.blur(upper="retain", lower="forget", gamma=gamma)
    return Recipe(
        parts,
        _recipe.chain(
            combiner, learning_rate=learning_rate, weight_decay=weight_decay, clip=clip
        ),
    )


def rmu(
    model: Model,
    *,
    gamma: float | optax.Schedule = 1 / 800,
    coefficient: float = 6.5,
    layers: Sequence[int] = _rmu.LAYERS,
    topics: int = 1,
    seed: int = 0,
    reference: str = "model",
    tokens: str = "real",
    learning_rate: Rate = 5e-5,
    weight_decay: float = 0.0,
    clip: float | None = None,
    eps: float = 1e-6 / 800,
) -> Recipe:
    """BLUR with RMU's two losses, as on WMDP; see recipes.rmu.wmdp.

    Args:
        model, coefficient, layers, topics, seed, reference, tokens, lr, weight_decay,
            clip: as for recipes.rmu.wmdp.
        gamma: how far the forget loss goes down at each step. The authors weigh the
            projected retain gradient by alpha = 800 instead, which is gamma = 1 / alpha
            but for the length of the whole update. Adam sees that beside eps only.
        eps: AdamW's; the authors have 1e-6, for updates alpha times as long.
    """
    layers = _recipe.layers(model, layers)
    forget, retain = _rmu.pair(
        model,
        layer=layers[-1],
        coefficient=coefficient,
        topics=topics,
        seed=seed,
        reference=reference,
        tokens=tokens,
    )
    combiner = combine.blur(upper="retain", lower="forget", gamma=gamma)
    rest = dict(
        learning_rate=learning_rate, weight_decay=weight_decay, clip=clip, eps=eps
    )
    tx = _recipe.chain(combiner, **rest)
    parts = {"forget": forget, "retain": retain}
    return Recipe(parts, tx, _rmu.trainable(layers))
