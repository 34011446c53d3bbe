# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: images are shifted and mirrored where a model trains."""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.typing import Array, Model, PRNGKey


def augment(model: Model, *, pad: int = 4, flip: bool = True) -> Model:
    """A Model that sees each image shifted and mirrored at random while it trains.

    Each image is cut out of itself with a border of zeros, anew in every pass that has
    an key; passes without one (metrics, the reference) see it as it is.

    Args:
        model: of models.vision.
        pad: pixels an image is shifted by at most, in both directions; 0 for none.
        flip: whether left and right change places, for every second image on average.
    Returns:
        The model; its parameters are the same.
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
    """Images [B, H, W, C], each cut out of its padded self and perhaps mirrored."""
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
