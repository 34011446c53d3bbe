# SPDX-License-Identifier: Apache-2.0
"""RMU: steer one layer's hidden states on the forget set towards a random direction and
fix them on the retain set (arXiv 2403.03218).

    forget: |h(x) - c u|^2     retain: alpha |h(x) - h_ref(x)|^2

with h the output of one block and u a random direction, drawn once for each topic.
Three kernels train and the forward pass stops at the block that is read. Defaults are
those of the authors' run on Zephyr-7B, which has 32 layers.
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
        model: the model to unlearn, with named sites (models.make).
        alpha: weight of the retain term. The released code's default is 100.
        coefficient: norm of the steering vectors. The released code's default is 20.
        adaptive: adaptive RMU (arXiv 2408.06223): the norm of the vectors is `adaptive`
            times that of the reference's state; 5.0 in that paper. None is plain RMU.
        layers: layers whose `mlp/down` kernel trains, or those of all experts; the
            output of the last is read.
        topics: number of steering vectors. With more than one the forget batches have a
            column `topic` [B] int32.
        seed: of the steering vectors.
        reference: "model" runs the reference up to the layer, "column" reads
            `ref_hidden` from the batches.
        tokens: which tokens count, "real", "answer" or "all"; the released code counts
            all.
        learning_rate: AdamW's learning rate or schedule.
        weight_decay: decoupled.
        clip: largest norm of the gradient, or None.
        eps: AdamW's. The loss is a mean over D, so its gradients are not much larger
            than eps. The authors' optimizer adds eps before the bias correction, optax
            after it.
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
