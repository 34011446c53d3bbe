# SPDX-License-Identifier: Apache-2.0
"""Generators and discriminators of images, as pure functions over dicts of arrays.

Experimental: names and behaviour may change in any release.

    net = models.gan.make(models.gan.GanConfig((28, 28, 1), ups=2))
    params = net.init(jax.random.key(0))
    images = net.generate(params["generator"], latents)        # [B, H, W, C] in [0, 1]

The defaults are those of DCGAN for 32 x 32 pixels. Both networks use pixels in [0, 1],
as image models do. Batch normalisation always uses the statistics of the batch, and the
discriminator runs on real and on generated images in separate batches.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _pixels
from jaxunlearn.typing import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """Settings of a generator and a discriminator.

    Attributes:
        shape: (H, W, C) of an image; 2 ** ups must divide H and W.
        latent: size of a latent vector.
        width: channels of the discriminator's first layer, doubled by each following
            layer; the generator has the reverse.
        ups: number of times that the generator doubles height and width.
        norm: whether the discriminator normalises by batch after its first layer; use
            False for losses with a gradient penalty.
    """

    shape: tuple[int, int, int] = (32, 32, 3)
    latent: int = 100
    width: int = 64
    ups: int = 3
    norm: bool = True


class Gan(NamedTuple):
    """A generator and a discriminator as pure functions.

    Attributes:
        init: key -> {"generator": params, "discriminator": params}.
        generate: (generator params, latents [B, latent]) -> images [B, H, W, C].
        discriminate: (discriminator params, images) -> logits [B] float32, large for
            real images.
        config: the settings.
    """

    init: Callable[[PRNGKey], Params]
    generate: Callable[[Params, Array], Array]
    discriminate: Callable[[Params, Array], Array]
    config: GanConfig


def make(config: GanConfig) -> Gan:
    """The networks that a config describes.

    Raises:
        ValueError: if 2 ** ups does not divide height and width, or a number is below
            1.
    """
    _checks.positive_int(
        "gan.make", latent=config.latent, width=config.width, ups=config.ups
    )
    step = 2**config.ups
    if any(side % step for side in config.shape[:2]):
        raise ValueError(
            f"gan.make needs sides that 2 ** ups = {step} divides, got "
            f"shape={config.shape}. Change ups."
        )
    generator, discriminator = _Generator(config), _Discriminator(config)

    def init(key):
        a, b = jax.random.split(key)
        latents = jnp.zeros((2, config.latent), jnp.float32)
        images = jnp.zeros((2, *config.shape), jnp.float32)
        return {
            "generator": generator.init(a, latents)["params"],
            "discriminator": discriminator.init(b, images)["params"],
        }

    def generate(params, latents):
        return generator.apply({"params": params}, latents)

    def discriminate(params, images):
        pixels = _pixels.as_float("A discriminator", images)
        return discriminator.apply({"params": params}, pixels)

    return Gan(init, generate, discriminate, config)


_INIT = nn.initializers.normal(0.02)


class _Norm(nn.Module):
    """Normalisation by the statistics of the current batch, also after training."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        axes = tuple(range(x.ndim - 1))
        mean, var = jnp.mean(x, axes), jnp.var(x, axes)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


class _Generator(nn.Module):
    config: GanConfig

    @nn.compact
    def __call__(self, z):
        c = self.config
        height, width, colours = c.shape
        start = c.width * 2 ** (c.ups - 1)
        sides = height // 2**c.ups, width // 2**c.ups
        x = nn.Dense(sides[0] * sides[1] * start, kernel_init=_INIT)(z)
        x = nn.relu(_Norm()(x.reshape(-1, *sides, start)))
        for i in range(c.ups - 1):
            channels = start // 2 ** (i + 1)
            x = nn.ConvTranspose(channels, (4, 4), (2, 2), kernel_init=_INIT)(x)
            x = nn.relu(_Norm()(x))
        x = nn.ConvTranspose(colours, (4, 4), (2, 2), kernel_init=_INIT)(x)
        return (jnp.tanh(x) + 1) / 2


class _Discriminator(nn.Module):
    config: GanConfig

    @nn.compact
    def __call__(self, image):
        c = self.config
        x = 2 * image - 1
        for i in range(c.ups):
            x = nn.Conv(c.width * 2**i, (4, 4), 2, kernel_init=_INIT)(x)
            x = _Norm()(x) if c.norm and i else x
            x = nn.leaky_relu(x, 0.2)
        x = nn.Dense(1, kernel_init=_INIT)(x.reshape(len(x), -1))
        return x[:, 0].astype(jnp.float32)
