# SPDX-License-Identifier: Apache-2.0
"""Model inversion: what a classifier thinks an image of a class looks like."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import _checks, losses
from jaxunlearn.typing import Model, Params


def invert_classes(
    model: Model,
    params: Params,
    classes: Sequence[int],
    shape: tuple[int, int, int],
    *,
    steps: int = 200,
    learning_rate: float = 0.05,
    clip: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, from black on, that make the model sure of each class.

    Minimises the cross-entropy -log p(class | image) over the pixels by Adam. Compare
    the images with those that were forgotten, and with what a retrained model gives.

    Args:
        model, params: the attacked classifier, of models.vision, as it is used.
        classes: labels to draw.
        shape: (H, W, C) of an image.
        steps, lr: of Adam.
        clip: keep pixels in [0, 1]; the paper's code does not.
    Returns:
        (images [k, H, W, C] float32, their cross-entropies [k], nats).
    Raises:
        ValueError: for no class, one that the model does not have, or numbers out of
            range.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "attacks.invert_classes"
    _checks.positive_int(owner, steps=steps)
    _checks.positive(owner, learning_rate=learning_rate)
    labels = jnp.asarray(classes, jnp.int32)
    if labels.ndim != 1 or not labels.size:
        raise ValueError(f"{owner} needs at least one class, got {classes}.")
    count = _classes(model, params, tuple(shape))
    strange = [int(x) for x in labels if not 0 <= x < count]
    if strange:
        raise ValueError(
            f"{owner} needs classes from 0 to {count - 1}, which the model has, got "
            f"{_checks.listed(strange)}."
        )
    image, values = _invert(
        params, labels, model, tuple(shape), steps, learning_rate, clip
    )
    return np.asarray(image), np.asarray(values)


def _classes(model, params, shape) -> int:
    """How many classes the model tells apart; nothing is computed."""

    def logits(params, image):
        return model.unembed(params, model.apply(params, {"image": image}).hidden[:, 0])

    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(logits, params, image).shape[-1]


def _invert(params, labels, model, shape, steps, learning_rate, clip):
    image = jnp.zeros((len(labels), *shape), jnp.float32)
    state = optax.adam(learning_rate).init(image)
    for _ in range(steps):
        image, state = _step(image, state, params, labels, model, learning_rate, clip)
    return image, _values(image, params, labels, model)


# A program a step: convolutions in a loop of XLA's take a CPU several times longer.
@partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=(0, 1))
def _step(image, state, params, labels, model, learning_rate, clip):
    grads = jax.grad(lambda x: jnp.sum(_values(x, params, labels, model)))(image)
    updates, state = optax.adam(learning_rate).update(grads, state)
    image = optax.apply_updates(image, updates)
    return jnp.clip(image, 0, 1) if clip else image, state


@partial(jax.jit, static_argnums=3)
def _values(image, params, labels, model):
    """The cross-entropy of each image's label."""
    hidden = model.apply(params, {"image": image}).hidden[:, 0]
    logps = losses.token_logps(model.unembed(params, hidden), labels)
    return losses.nll(logps)
