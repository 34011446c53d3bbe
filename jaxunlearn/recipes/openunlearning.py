# SPDX-License-Identifier: Apache-2.0
"""The methods of OpenUnlearning as weighted sums, with that project's defaults.

Each minimises gamma * forget + alpha * retain; gamma weighs the forget loss here, as in
that project's configurations. The two losses merely add, so they are one joint term:
one forward pass over both streams and one gradient tree. Retain is the token-mean NLL,
or with retain_loss="kl" the divergence from the reference model.

Common settings: gamma and alpha as above, `retain` names the retain streams and their
weights, `learning_rate` is AdamW's learning rate or schedule, weight_decay is decoupled and clip
bounds the norm of the whole gradient.
"""

from collections.abc import Mapping
from functools import partial

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe, _rmu
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.recipes.blur import RETAIN
from jaxunlearn.typing import Model


def ascent(
    model: Model,
    *,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> Recipe:
    """GradAscent: minus the token-mean NLL of `forget` and nothing that retains."""
    forget = terms.on_logps(losses.ascent, model, "forget", reduce="token")
    return _sum(forget, 1.0, {}, learning_rate, weight_decay, clip)


def graddiff(
    model: Model,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """GradDiff: ascent on `forget`, NLL on the retain streams."""
    forget = terms.on_logps(losses.ascent, model, "forget", reduce="token")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def npo(
    model: Model,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """NPO on `forget` (with `ref_logps`), NLL on the retain streams."""
    forget = _recipe.forget_npo(model, beta=beta)
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def simnpo(
    model: Model,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    gamma: float = 0.125,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """SimNPO on `forget` (needs no reference), NLL on the retain streams."""
    loss = partial(losses.simnpo, beta=beta, delta=delta)
    forget = terms.on_logps(loss, model, "forget")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def dpo(
    model: Model,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """DPO with NPO's factor 2 / beta: answers of `alternate` over those of `forget`.

    Row i of both streams answers the same question, and both carry `ref_logps`.
    """
    loss = partial(losses.dpo, beta=beta, compat="openunlearning")
    forget = terms.on_pairs(loss, model, "alternate", "forget")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def idkdpo(
    model: Model,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """IdkDPO: `dpo` whose `alternate` holds refusals ("I don't know")."""
    return dpo(
        model,
        beta=beta,
        gamma=gamma,
        alpha=alpha,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        retain=retain,
        retain_loss=retain_loss,
    )


def altpo(
    model: Model,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """AltPO: `dpo` whose `alternate` holds answers that the model itself made up.

    Its authors sample five a question at temperature 1 and train 2 epochs; their grid
    is beta 0.05 to 0.5, lr 1e-5 to 5e-5, alpha 1 to 5 (arXiv 2409.13474).
    """
    return dpo(
        model,
        beta=beta,
        gamma=gamma,
        alpha=alpha,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        retain=retain,
        retain_loss=retain_loss,
    )


def undial(
    model: Model,
    *,
    beta: float = 10.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    learning_rate: Rate = 1e-4,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """UNDIAL: distil from the reference with the answer's logits lowered by beta.

    alpha 0 is the configuration's: nothing else retains.
    """
    loss = partial(losses.undial, beta=beta)
    forget = terms.on_tokens(loss, model, "forget")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def ce_u(
    model: Model,
    *,
    skip: int = 1,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> Recipe:
    """CE-U on `forget` without each answer's first `skip` tokens; nothing retains."""
    forget = terms.on_tokens(losses.ce_u, model, "forget", skip=skip)
    return _sum(forget, 1.0, {}, learning_rate, weight_decay, clip)


def wga(
    model: Model,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """WGA: ascent on `forget`, each token weighed by its probability ** beta."""
    loss = partial(losses.wga, beta=beta)
    forget = terms.on_logps(loss, model, "forget", reduce="token")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def satimp(
    model: Model,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    gamma: float = 0.1,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """SatImp: ascent on `forget`, tokens weighed by p ** beta1 * (1 - p) ** beta2."""
    loss = partial(losses.satimp, beta1=beta1, beta2=beta2)
    forget = terms.on_logps(loss, model, "forget", reduce="token")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def incorrect(
    model: Model,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
    retain_loss: str = "nll",
) -> Recipe:
    """Random labels or incorrect answers: learn `alternate`, answers that are wrong.

    Its rows are the forget questions with other answers (shuffled, random or refused).
    """
    forget = terms.on_logps(losses.nll, model, "alternate", reduce="token")
    parts = _retain(model, retain, alpha, retain_loss)
    return _sum(forget, gamma, parts, learning_rate, weight_decay, clip)


def pdu(
    model: Model,
    *,
    epsilon: float = 0.3,
    gamma: float = 1.0,
    alpha: float = 100.0,
    step_size: float = 5.0,
    warm_up: int = 0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """PDU: flatten the logits on `forget` while the retain NLL stays below epsilon.

    The multiplier begins at alpha and moves by step_size. The numbers are those of its
    TOFU runs, where it first stands still for 5 epochs: give that in steps as
    `warm_up`.
    """
    parts = {
        "forget": terms.on_tokens(losses.logit_margin, model, "forget"),
        "retain": _recipe.retain_nll(model, retain),
    }
    combiner = combine.primal_dual(
        epsilon=epsilon,
        weight=gamma,
        initial_dual=alpha,
        step_size=step_size,
        warmup_steps=warm_up,
    )
    tx = _recipe.chain(
        combiner, learning_rate=learning_rate, weight_decay=weight_decay, clip=clip
    )
    return Recipe(parts, tx)


def rmu(
    model: Model,
    *,
    coefficient: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    layer: int = 7,
    trainable: str = r".*",
    seed: int = 0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> Recipe:
    """RMU in that project's settings: every leaf trains, answer tokens count.

    Each row's mean is taken over its own tokens, as the paper has it; that project's
    code multiplies the mean of sums by the mean of inverse lengths.
    """
    (layer,) = _recipe.layers(model, (layer,))
    forget, retain = _rmu.pair(
        model, layer=layer, coefficient=coefficient, seed=seed, tokens="answer"
    )
    return _recipe.weighted(
        {"forget": forget, "retain": retain},
        {"forget": gamma, "retain": alpha},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        trainable=trainable,
    )


def task_vector(
    model: Model,
    *,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> Recipe:
    """The finetuning on `forget` whose task vector edits.task_vector then takes away.

    Run it on a copy, then edits.task_vector(params, tuned, scale=5.0).
    """
    forget = terms.on_logps(losses.nll, model, "forget", reduce="token")
    return _sum(forget, 1.0, {}, learning_rate, weight_decay, clip)


def _retain(model: Model, retain: Mapping[str, float], alpha: float, kind: str):
    parts = _recipe.retain_parts(model, retain, kind)
    weights = {name: alpha * retain[name] for name in parts}
    # A weight of 0 would still cost its forward and backward pass.
    return {
        name: (weights[name], part) for name, part in parts.items() if weights[name]
    }


def _sum(forget, gamma, retain, learning_rate, weight_decay, clip) -> Recipe:
    parts = {"forget": forget} | {name: term for name, (_, term) in retain.items()}
    weights = {"forget": gamma} | {name: weight for name, (weight, _) in retain.items()}
    return _recipe.weighted(
        parts,
        weights,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
    )
