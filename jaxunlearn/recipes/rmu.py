# SPDX-License-Identifier: Apache-2.0
"""RMU: steer what one layer says about the forget set, hold what it says elsewhere
(arXiv 2403.03218).

    forget: |h(x) - c u|^2     retain: alpha |h(x) - h_ref(x)|^2

with h the output of one block, u a random direction drawn once a topic. Three kernels
train and the forward pass stops at the block that is read. Numbers are those of the
authors' run on Zephyr-7B, of 32 layers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import combine, losses, terms
from jaxunlearn.recipes import _recipe
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.typing import Model

LAYERS = (5, 6, 7)  # of Zephyr-7B: those that train; the last is read


def wmdp(
    model: Model,
    *,
    alpha: float = 1200.0,
    coefficient: float = 6.5,
    adaptive: float | None = None,
    layers: Sequence[int] = LAYERS,
    topics: int = 1,
    seed: int = 0,
    reference: str = "model",
    tokens: str = "real",
    lr: Rate = 5e-5,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> Recipe:
    """RMU on `mlp/down` of three layers, as on WMDP.

    Args:
        model: the model to unlearn, with sites (models.make).
        alpha: weight of the retain term. The released code's default is 100.
        coefficient: length of the steering vectors. The released code's default is 20.
        adaptive: adaptive RMU (arXiv 2408.06223): vectors that many times as long as
            the reference's own state; 5.0 there. None is plain RMU.
        layers: those whose `mlp/down` kernel trains; the last one is read.
        topics: how many steering vectors. With more than one the forget batches carry
            `topic` [B] int32.
        seed: of the steering vectors.
        reference: "model" runs the reference up to the layer, "column" reads
            `ref_hidden` from the batches.
        tokens: which count, "real", "answer" or "all"; the released code counts all.
        lr: AdamW's learning rate or schedule.
        weight_decay: decoupled.
        clip: largest norm of the gradient, or None.
    Returns:
        A Recipe on the streams `forget` and `retain`.
    """
    layers = _recipe.layers(model, layers)
    forget, retain = pair(
        model,
        layer=layers[-1],
        coefficient=coefficient,
        adaptive=adaptive,
        topics=topics,
        seed=seed,
        reference=reference,
        tokens=tokens,
    )
    total = terms.joint(
        {"forget": forget, "retain": retain}, {"forget": 1.0, "retain": alpha}
    )
    tx = _recipe.chain(
        combine.weighted_sum(), lr=lr, weight_decay=weight_decay, clip=clip
    )
    return Recipe({"total": total}, tx, trainable(layers))


def pair(
    model: Model,
    *,
    layer: int,
    coefficient: float,
    adaptive: float | None = None,
    topics: int = 1,
    seed: int = 0,
    reference: str = "model",
    tokens: str = "real",
) -> tuple[terms.BoundTerm, terms.BoundTerm]:
    """RMU's two terms, on `forget` and on `retain`; arguments as for `wmdp`."""
    width = model.sites["block"].units
    keys = jax.random.split(jax.random.key(seed), topics)
    vectors = jnp.stack(
        [losses.steering_vector(key, width, coefficient=coefficient) for key in keys]
    )
    shared = {"layer": layer, "reference": reference, "tokens": tokens}
    target = vectors if topics > 1 else vectors[0]
    return (
        terms.on_hidden(
            losses.rmu, model, "forget", target=target, adaptive=adaptive, **shared
        ),
        terms.on_hidden(losses.rmu, model, "retain", **shared),
    )


def trainable(layers: Sequence[int]) -> str:
    """The pattern of the kernels that train, for trees.split."""
    return r"blocks/mlp/down/kernel@" + ",".join(map(str, layers))
