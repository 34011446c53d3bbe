# SPDX-License-Identifier: Apache-2.0
"""The methods of OpenUnlearning as weighted sums, with that project's defaults.

Each minimises gamma * forget + alpha * retain. gamma weighs the forget loss, as in that
project's configurations. The two losses are added, so they are one joint term: one
forward pass over both streams and one gradient tree.

Common settings, after those of the method:
    gamma, alpha: weights of the forget and the retain loss.
    learning_rate: AdamW's learning rate or schedule.
    weight_decay: decoupled.
    clip: largest norm of the gradient, or None.
    retain: names of the retain streams and their weights.
    retain_loss: "nll", the token-mean NLL, or "kl", the divergence from the reference.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import partial

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe, _rmu
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.recipes.blur import RETAIN
from jaxunlearn.typing import Model

_OPTIMIZER = {"learning_rate": 1e-5, "weight_decay": 0.0, "clip": 1.0}
_RETAIN = {"gamma": 1.0, "alpha": 1.0, **_OPTIMIZER}
_RETAIN |= {"retain": RETAIN, "retain_loss": "nll"}
_TYPES = {
    "learning_rate": Rate,
    "clip": float | None,
    "retain": Mapping[str, float],
    "retain_loss": str,
}


def _method(*, retains: bool = True, **defaults: float) -> Callable:
    """Makes a recipe of a function that makes its forget term.

    The recipe takes the arguments of the function and the common settings; without
    `retains` only those of the optimizer. `defaults` replace the common defaults.
    """
    common = (_RETAIN if retains else _OPTIMIZER) | defaults

    def decorate(make_forget: Callable[..., terms.BoundTerm]) -> Callable[..., Recipe]:
        method = inspect.signature(make_forget)
        settings = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=value,
                annotation=_TYPES.get(name, float),
            )
            for name, value in common.items()
        ]
        signature = method.replace(
            parameters=[*method.parameters.values(), *settings],
            return_annotation=Recipe,
        )

        @functools.wraps(make_forget)
        def recipe(*args, **kwargs):
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                known = ", ".join(list(signature.parameters)[1:])
                raise TypeError(
                    f"openunlearning.{make_forget.__name__}: {error}. Its settings, by "
                    f"keyword, are {known}."
                ) from None
            bound.apply_defaults()
            given = bound.arguments
            parts = {"forget": make_forget(**{k: given[k] for k in method.parameters})}
            weights = {"forget": given.get("gamma", 1.0)}
            # A retain loss of weight 0 would still cost its forward and backward pass.
            if retains and given["alpha"]:
                retain = given["retain"]
                parts |= _recipe.retain_parts(
                    given["model"], retain, given["retain_loss"]
                )
                weights |= {name: given["alpha"] * w for name, w in retain.items()}
            optimizer = {name: given[name] for name in _OPTIMIZER}
            return _recipe.weighted(parts, weights, **optimizer)

        recipe.__signature__ = signature
        return recipe

    return decorate


@_method(retains=False)
def ascent(model: Model):
    """GradAscent: minus the token-mean NLL of `forget`, without a retain loss."""
    return terms.on_logps(losses.ascent, model, "forget", reduce="token")


@_method()
def graddiff(model: Model):
    """GradDiff: ascent on `forget`, NLL on the retain streams."""
    return terms.on_logps(losses.ascent, model, "forget", reduce="token")


@_method()
def npo(model: Model, *, beta: float = 0.1):
    """NPO on `forget` (with `ref_logps`), NLL on the retain streams."""
    return _recipe.forget_npo(model, beta=beta)


@_method(gamma=0.125)
def simnpo(model: Model, *, beta: float = 4.5, delta: float = 0.0):
    """SimNPO on `forget` (without a reference model), NLL on the retain streams."""
    loss = partial(losses.simnpo, beta=beta, delta=delta)
    return terms.on_logps(loss, model, "forget")


@_method()
def dpo(model: Model, *, beta: float = 0.1):
    """DPO with NPO's factor 2 / beta: answers of `alternate` over those of `forget`.

    Row i of both streams answers the same question, and both have `ref_logps` and
    `pair`: make them with evaluate.reference_logps and data.paired.
    """
    loss = partial(losses.dpo, beta=beta, compat="openunlearning")
    return terms.on_pairs(loss, model, win="alternate", lose="forget")


@_method()
def idkdpo(model: Model, *, beta: float = 0.1):
    """IdkDPO: `dpo` where the answers of `alternate` are refusals ("I don't know")."""
    return dpo.__wrapped__(model, beta=beta)


@_method()
def altpo(model: Model, *, beta: float = 0.1):
    """AltPO: `dpo` where the model itself generated the answers of `alternate`.

    The authors sample five answers a question at temperature 1 and train 2 epochs;
    their grid is beta 0.05 to 0.5, learning rate 1e-5 to 5e-5, alpha 1 to 5 (arXiv
    2409.13474).
    """
    return dpo.__wrapped__(model, beta=beta)


@_method(alpha=0.0, learning_rate=1e-4)
def undial(model: Model, *, beta: float = 10.0):
    """UNDIAL: distil from the reference with the answer's logits lowered by beta.

    alpha 0 is that of the configuration: there is no retain loss.
    """
    return terms.on_tokens(partial(losses.undial, beta=beta), model, "forget")


@_method(retains=False)
def ce_u(model: Model, *, skip: int = 1):
    """CE-U on `forget` without each answer's first `skip` tokens; no retain loss."""
    return terms.on_tokens(losses.ce_u, model, "forget", skip=skip)


@_method()
def wga(model: Model, *, beta: float = 1.0):
    """WGA: ascent on `forget`, each token weighted by its probability ** beta."""
    loss = partial(losses.wga, beta=beta)
    return terms.on_logps(loss, model, "forget", reduce="token")


@_method(gamma=0.1)
def satimp(model: Model, *, beta1: float = 5.0, beta2: float = 1.0):
    """SatImp: ascent on `forget`, tokens weighted by p ** beta1 * (1 - p) ** beta2."""
    loss = partial(losses.satimp, beta1=beta1, beta2=beta2)
    return terms.on_logps(loss, model, "forget", reduce="token")


@_method()
def incorrect(model: Model):
    """Random labels or incorrect answers: learn `alternate`, whose answers are wrong.

    Its rows are the forget questions with other answers (shuffled, random or refused).
    """
    return terms.on_logps(losses.nll, model, "alternate", reduce="token")


@_method(retains=False)
def task_vector(model: Model):
    """The finetuning on `forget` whose task vector edits.task_vector then subtracts.

    Run it on a copy, then edits.task_vector(params, tuned, scale=5.0).
    """
    return terms.on_logps(losses.nll, model, "forget", reduce="token")


def pdu(
    model: Model,
    *,
    epsilon: float = 0.3,
    gamma: float = 1.0,
    alpha: float = 100.0,
    step_size: float = 5.0,
    warmup_steps: int = 0,
    learning_rate: Rate = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """PDU: minimise the logit margin on `forget` while the retain NLL is below epsilon.

    The multiplier begins at alpha and moves by step_size. The numbers are those of the
    TOFU runs, which hold it constant for the first 5 epochs: pass their number of steps
    as `warmup_steps`.
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
        warmup_steps=warmup_steps,
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

    Each row is averaged over its tokens, as in the paper; that project's code
    multiplies the mean of sums by the mean of inverse lengths.
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
