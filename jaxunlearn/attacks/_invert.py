# SPDX-License-Identifier: Apache-2.0
"""Model inversion: images that a classifier assigns to a class."""

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
    """Optimises an image for each class, starting from black.

    Minimises the cross-entropy -log p(class | image) over the pixels with Adam. The
    attacker needs the weights. Compare the images with the forgotten ones, and with
    those of a retrained model: similar images mean that the class was not removed.

    Args:
        model, params: the attacked classifier, of models.vision.
        classes: [k] labels, one image for each.
        shape: (H, W, C) of an image.
        steps: number of updates of Adam.
        learning_rate: of Adam.
        clip: whether pixels are kept in [0, 1]; the paper's code does not do this.
    Returns:
        (images [k, H, W, C] float32, their cross-entropies [k], nats).
    Raises:
        ValueError: if there is no class, a label is not one of the model's, or a number
            is out of range.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "attacks.invert_classes"
    _checks.positive_int(owner, steps=steps)
    _checks.positive(owner, learning_rate=learning_rate)
    labels = jnp.asarray(classes, jnp.int32)
    if labels.ndim != 1 or not labels.size:
        raise ValueError(f"{owner} needs at least one class, got {classes}.")
    num_classes = _num_classes(model, params, tuple(shape))
    if wrong := [int(x) for x in labels if not 0 <= x < num_classes]:
        raise ValueError(
            f"{owner} needs classes from 0 to {num_classes - 1}, those of the model, "
            f"got {_checks.listed(wrong)}."
        )
    image, values = _invert(
        params, labels, model, tuple(shape), steps, learning_rate, clip
    )
    return np.asarray(image), np.asarray(values)


def _num_classes(model, params, shape) -> int:
    """The number of classes of the model, from shapes only."""

    def logits(params, image):
        return model.unembed(params, model.apply(params, {"image": image}).hidden[:, 0])

    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(logits, params, image).shape[-1]


def _invert(params, labels, model, shape, steps, learning_rate, clip):
    image = jnp.zeros((len(labels), *shape), jnp.float32)
    state = optax.adam(learning_rate).init(image)
    learning_rate = jnp.float32(learning_rate)  # data: one program runs every rate
    for _ in range(steps):
        image, state = _step(image, state, params, labels, learning_rate, model, clip)
    return image, _values(image, params, labels, model)


# One program per step: on CPUs, convolutions in an XLA loop are several times slower.
@partial(jax.jit, static_argnums=(5, 6), donate_argnums=(0, 1))
def _step(image, state, params, labels, learning_rate, model, clip):
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
