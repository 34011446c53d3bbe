# SPDX-License-Identifier: Apache-2.0
"""SURE: large steps, confined to what the forget gradient is large on (2410.16454).

Numbers are those of the paper's appendix D for MUSE Books: rate 1e-4, ten times that of
its baselines; a weight of 20 with the percentile 90 for NPO with KL, of 400 with 99 for
ascent with NLL. Its code sums KL over the tokens of an answer and divides by answers
only; here every retain loss is a mean over tokens, so for that code's balance multiply
alpha of `npo` by the mean length of the retain answers. That code's NPO is the formula
on raw logits, `losses.npo_logits`, which compat="released" takes.

Common settings: alpha weighs the retain term, `retain` names the retain streams and
their weights, retain_loss is "nll" of their answers or "kl" to the reference model
(which make_step then needs), percentile, unit, refresh and compat are those of
`combine.saliency`, lr is AdamW's learning rate or schedule, weight_decay is decoupled
and clip bounds the norm of what moves.
"""

from collections.abc import Mapping
from functools import partial

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.recipes.blur import RETAIN
from jaxunlearn.typing import Model, Term


def npo(
    model: Model,
    *,
    beta: float = 0.1,
    alpha: float = 20.0,
    percentile: float = 90.0,
    unit: str = "row",
    refresh: str = "step",
    compat: str | None = None,
    learning_rate: Rate = 1e-4,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "kl",
) -> Recipe:
    """NPO on `forget` (with `ref_logps`), KL to the reference on the retain streams.

    Args:
        beta: NPO's inverse temperature.
        compat: "released" also puts NPO on raw logits, which needs no `ref_logps`.
        The others: see the module.
    Returns:
        A Recipe on `forget` and the retain streams, which needs the reference model.
    """
    forget = _recipe.forget_npo(model, beta=beta)
    if compat == "released":
        logits = partial(losses.npo_logits, beta=beta)
        forget = terms.on_tokens(logits, model, "forget")
    return _sure(
        forget,
        _retain(model, retain, retain_loss),
        alpha,
        dict(percentile=percentile, unit=unit, refresh=refresh, compat=compat),
        dict(learning_rate=learning_rate, weight_decay=weight_decay, clip=clip),
    )


def graddiff(
    model: Model,
    *,
    alpha: float = 400.0,
    percentile: float = 99.0,
    unit: str = "row",
    refresh: str = "step",
    compat: str | None = None,
    learning_rate: Rate = 1e-4,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """Gradient ascent on `forget`, NLL on the retain streams; for settings see the
    module."""
    return _sure(
        terms.on_logps(losses.ascent, model, "forget", reduce="token"),
        _retain(model, retain, retain_loss),
        alpha,
        dict(percentile=percentile, unit=unit, refresh=refresh, compat=compat),
        dict(learning_rate=learning_rate, weight_decay=weight_decay, clip=clip),
    )


def _retain(model: Model, retain: Mapping[str, float], kind: str) -> Term:
    if kind == "nll":
        return _recipe.retain_nll(model, retain)
    return terms.joint(_recipe.retain_parts(model, retain, kind), retain)


def _sure(forget: Term, retain: Term, alpha: float, mask: dict, rest: dict) -> Recipe:
    weights = {"forget": 1.0, "retain": alpha}
    chain = _recipe.chain(combine.weighted_sum(weights), **rest)
    tx = combine.saliency(chain, **mask)
    return Recipe({"forget": forget, "retain": retain}, tx)
