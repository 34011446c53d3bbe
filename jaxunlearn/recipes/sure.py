# SPDX-License-Identifier: Apache-2.0
"""SURE: large steps, restricted to the rows with large forget gradients
(arXiv 2410.16454).

Defaults are those of the paper's appendix D for MUSE Books: learning rate 1e-4, ten
times that of its baselines; alpha 20 and percentile 90 for NPO with KL; alpha 400 and
percentile 99 for ascent with NLL. Its code sums KL over the tokens of an answer and
divides by the number of answers. Here every retain loss is a mean over tokens, so to
get the same balance multiply alpha of `npo` by the mean length of the retain answers.
That code applies NPO's formula to raw logits (`losses.npo_logits`), which
compat="released" selects.

Common settings:
    alpha: weight of the retain term.
    retain: names of the retain streams and their weights.
    retain_loss: "nll" of their answers, or "kl" to the reference model.
    percentile, unit, refresh, compat: as for `combine.saliency`.
    learning_rate: AdamW's learning rate or schedule.
    weight_decay: decoupled.
    clip: largest norm of the masked gradient, or None.
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
        compat: "released" also applies NPO to raw logits, without `ref_logps`.
        The others: see the module.
    Returns:
        A Recipe on `forget` and the retain streams that needs the reference model.
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
    """Gradient ascent on `forget`, NLL on the retain streams; settings as above."""
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


def _sure(
    forget: Term, retain: Term, alpha: float, mask: dict, optimizer: dict
) -> Recipe:
    weights = {"forget": 1.0, "retain": alpha}
    chain = _recipe.chain(combine.weighted_sum(weights), **optimizer)
    tx = combine.saliency(chain, **mask)
    return Recipe({"forget": forget, "retain": retain}, tx)
