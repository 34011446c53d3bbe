# SPDX-License-Identifier: Apache-2.0
"""BLUR: bi-level unlearning in which forgetting has priority (arXiv 2506.08164).

min r(theta) over the minimisers of f(theta): each step moves along

    u = g_r + (gamma - <g_r, g_f> / |g_f|^2) g_f,    so that <u, g_f> = gamma |g_f|^2

with f the forget loss, r the retain loss. Defaults are those of the authors' TOFU code.
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
    """BLUR with NPO as lower and NLL as upper objective.

    gamma has the largest effect: 1.0 is the authors' value, and if forget and retain
    gradients conflict it can also erase retained facts. The quickstart uses 0.2.

    Args:
        model: the model to unlearn.
        beta: NPO's inverse temperature.
        gamma: rate at which each step lowers the forget loss, >= 0.
        learning_rate: AdamW's learning rate or schedule.
        weight_decay: decoupled, after the projection.
        clip: largest norm of the projected update; None as in the paper.
        retain: retain streams and their weights; their sum is the upper objective.
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
    """BLUR with gradient ascent as lower and NLL as upper objective.

    The arguments are those of `npo`. Ascent has no minimum, so BLUR's guarantee does
    not hold for it: stop early.
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
        model, coefficient, layers, topics, seed, reference, tokens, learning_rate,
            weight_decay, clip: as for recipes.rmu.wmdp.
        gamma: rate at which each step lowers the forget loss. The authors multiply the
            projected retain gradient by alpha = 800 instead. That is gamma = 1 / alpha
            except for the norm of the update, which matters in Adam only relative to
            eps.
        eps: AdamW's; the authors have 1e-6, for updates that are alpha times as long.
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
    optimizer = dict(
        learning_rate=learning_rate, weight_decay=weight_decay, clip=clip, eps=eps
    )
    tx = _recipe.chain(combiner, **optimizer)
    parts = {"forget": forget, "retain": retain}
    return Recipe(parts, tx, _rmu.trainable(layers))
