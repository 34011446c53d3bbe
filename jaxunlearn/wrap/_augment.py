# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: images are shifted and mirrored during training."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Model, PRNGKey


def augment(model: Model, *, pad: int = 4, flip: bool = True) -> Model:
    """A Model that shifts and mirrors each image at random during training.

    Each image is padded with zeros and cropped to its size at a random place, in every
    pass that has a key; passes without one (metrics, the reference) do not change it.

    Args:
        model: of models.vision.
        pad: largest shift in pixels, in both directions; 0 for no shift.
        flip: whether to mirror images left to right, with probability 1/2.
    Returns:
        The model, with the same parameters.
    Raises:
        ValueError: if pad is negative.
    """
    _checks.not_negative("wrap.augment", pad=pad)

    def apply(params, batch, *, key=None, **rest):
        if key is not None:
            shift_key, key = jax.random.split(key)
            batch = {**batch, "image": shifted(batch["image"], shift_key, pad, flip)}
        return model.apply(params, batch, key=key, **rest)

    return model._replace(apply=apply)


def shifted(image: Array, key: PRNGKey, pad: int, flip: bool) -> Array:
    """Images [B, H, W, C], each padded, cropped at random and perhaps mirrored."""
    rows, height, width, colours = image.shape
    where, side = jax.random.split(key)
    corner = jax.random.randint(where, (rows, 2), 0, 2 * pad + 1)
    wide = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def cut(x, at):
        start = (at[0], at[1], jnp.zeros_like(at[0]))
        return jax.lax.dynamic_slice(x, start, (height, width, colours))

    image = jax.vmap(cut)(wide, corner)
    if not flip:
        return image
    mirrored = jax.random.bernoulli(side, shape=(rows, 1, 1, 1))
    return jnp.where(mirrored, image[:, :, ::-1], image)
