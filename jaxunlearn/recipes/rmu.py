# SPDX-License-Identifier: Apache-2.0
"""RMU: steer what one layer says about the forget set, hold what it says elsewhere
(arXiv 2403.03218).

    forget: |h(x) - c u|^2     retain: alpha |h(x) - h_ref(x)|^2

with h the output of one block, u a random direction drawn once a topic. Three kernels
train and the forward pass stops at the block that is read. Numbers are those of the
authors' run on Zephyr-7B, of 32 layers.
"""

from collections.abc import Sequence

from jaxunlearn.recipes import _recipe, _rmu
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.typing import Model


def wmdp(
    model: Model,
    *,
    alpha: float = 1200.0,
    coefficient: float = 6.5,
    adaptive: float | None = None,
    layers: Sequence[int] = _rmu.LAYERS,
    topics: int = 1,
    seed: int = 0,
    reference: str = "model",
    tokens: str = "real",
    learning_rate: Rate = 5e-5,
    weight_decay: float = 0.0,
    clip: float | None = None,
    eps: float = 1e-6,
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
        learning_rate: AdamW's learning rate or schedule.
        weight_decay: decoupled.
        clip: largest norm of the gradient, or None.
        eps: AdamW's. Means over D have gradients that are not large beside it. The
            authors' optimizer adds it before the bias correction, optax after.
    Returns:
        A Recipe on the streams `forget` and `retain`.
    """
    layers = _recipe.layers(model, layers)
    forget, retain = _rmu.pair(
        model,
        layer=layers[-1],
        coefficient=coefficient,
        adaptive=adaptive,
        topics=topics,
        seed=seed,
        reference=reference,
        tokens=tokens,
    )
    return _recipe.weighted(
        {"forget": forget, "retain": retain},
        {"forget": 1.0, "retain": alpha},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        eps=eps,
        trainable=_rmu.trainable(layers),
    )
