# SPDX-License-Identifier: Apache-2.0
"""LLM Surgery: remove text, learn its replacement, retain the rest (arXiv 2409.13054).

    - unlearn * NLL(forget) + update * NLL(update) + retain * KL(reference || model)

The paper's abstract names the three terms but no weights and no bound. Here the weights
are 1, and the learning rate is that of OpenUnlearning's runs.
"""

from functools import partial

import optax

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.typing import Model


def weighted(
    model: Model,
    *,
    unlearn: float = 1.0,
    update: float = 1.0,
    retain: float = 1.0,
    cap: float | None = None,
    direction: str = "forward",
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> Recipe:
    """The three terms as one weighted sum.

    Args:
        model: the model to edit.
        unlearn, update, retain: weights of the terms.
        cap: tokens of `forget` whose NLL is above it, in nats, have no gradient; ln V
            is the NLL of a uniform guess. None, as in the paper, is unbounded.
        direction: of the KL divergence, "forward" or "reverse".
        learning_rate: AdamW's learning rate or schedule.
        weight_decay: decoupled.
        clip: largest norm of the gradient, or None.
    Returns:
        A Recipe on the streams `forget`, `update` and `retain` that needs the reference
        model.
    """
    parts = _parts(model, cap, direction)
    weights = {"forget": unlearn, "update": update, "retain": retain}
    return _recipe.weighted(
        parts,
        weights,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
    )


def bilevel(
    model: Model,
    *,
    gamma: float | optax.Schedule = 1.0,
    update: float = 1.0,
    retain: float = 1.0,
    cap: float | None = None,
    direction: str = "forward",
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> Recipe:
    """The same terms under BLUR: forgetting is the lower objective, updating and
    retaining are the upper one.

    Args:
        model, update, retain, cap, direction, learning_rate, weight_decay, clip: as for
            `weighted`.
        gamma: rate at which each step lowers the forget loss, >= 0.
    """
    parts = _parts(model, cap, direction)
    forget = parts.pop("forget")
    upper = terms.joint(parts, {"update": update, "retain": retain})
    tx = _recipe.chain(
        combine.blur(gamma=gamma),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
    )
    return Recipe({"forget": forget, "retain": upper}, tx)


def _parts(model, cap, direction):
    ascent = partial(losses.ascent, cap=cap)
    kl = partial(losses.kl, direction=direction)
    return {
        "forget": terms.on_logps(ascent, model, "forget", reduce="token"),
        "update": terms.on_logps(losses.nll, model, "update", reduce="token"),
        "retain": terms.on_tokens(kl, model, "retain"),
    }
