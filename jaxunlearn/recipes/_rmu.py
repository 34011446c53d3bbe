# SPDX-License-Identifier: Apache-2.0
"""The terms and the trainable kernels that all recipes with RMU's losses share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import losses, terms
from jaxunlearn.typing import Model

LAYERS = (5, 6, 7)  # of Zephyr-7B: the layers that train; the last is read


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
    """RMU's two terms, on `forget` and on `retain`; arguments as for `rmu.wmdp`."""
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
    """The pattern for trees.split of the kernels that train."""
    return r"blocks/mlp/((experts|shared)/)?down/kernel@" + ",".join(map(str, layers))
