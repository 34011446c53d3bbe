# SPDX-License-Identifier: Apache-2.0
"""The networks of `models.vision`, as Flax modules built from lists of layers."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

# Normalisation after convolutions if VisionConfig.norm is None.
_NORM = {"mlp": "none", "cnn": "batch", "vgg16": "none", "resnet18": "batch"}


class Net(nn.Module):
    """The parts `begin`, `middle` and `final` of a VisionConfig."""

    config: Any

    def setup(self):
        begin, middle, final = layers_of(self.config)
        self.begin = _Part(begin, self.config)
        self.middle = _Part(middle, self.config)
        self.final = _Final(final, self.config)

    def features(self, x, train):
        x = self.begin(x, "begin" in train)
        x = self.middle(x, "middle" in train)
        return self.final(x, "final" in train)

    def logits(self, x, train):
        return self.final.head(self.features(x, train))


class _Final(nn.Module):
    layers: tuple
    config: Any

    def setup(self):
        self.body = _Part(self.layers, self.config)
        self.head = nn.Dense(self.config.classes)

    def __call__(self, x, train):
        return self.body(x, train)


class _Part(nn.Module):
    """A sequence of layers; each is a tuple of its kind and its settings."""

    layers: tuple
    config: Any

    @nn.compact
    def __call__(self, x, train):
        for kind, *settings in self.layers:
            x = _LAYERS[kind](self.config, x, train, *settings)
        return x


def _conv(config, x, train, width, size=3, stride=1, relu=True):
    norm = config.norm or _NORM.get(config.family, "none")
    padding = [((size - 1) // 2,) * 2] * 2
    no_norm = norm == "none"
    x = nn.Conv(width, (size, size), stride, padding=padding, use_bias=no_norm)(x)
    # With momentum 0 the statistics are the batch's; with_batch_stats averages them.
    x = x if no_norm else nn.BatchNorm(not train, momentum=0.0, epsilon=1e-5)(x)
    return nn.relu(x) if relu else x


def _up(config, x, train, width, last):
    """Doubles the sides; the last layer returns pixels in [0, 1], then normalises."""
    x = nn.ConvTranspose(width, (4, 4), (2, 2))(x)
    if not last:
        return nn.relu(x)
    return (nn.sigmoid(x) - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def _pool(config, x, train, size=2, stride=2, pad=0):
    if (size, stride, pad) != (2, 2, 0):
        return nn.max_pool(x, (size, size), (stride, stride), [(pad, pad)] * 2)
    # On CPUs XLA's gradient of window maxima takes longer than the convolutions. Here
    # entries that tie share the gradient.
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _block(config, x, train, width, stride):
    """Two convolutions and a shortcut (He et al. 2015, arXiv 1512.03385)."""
    y = _conv(config, x, train, width, 3, stride)
    y = _conv(config, y, train, width, relu=False)
    if x.shape != y.shape:
        x = _conv(config, x, train, width, 1, stride, relu=False)
    return nn.relu(x + y)


class _Patches(nn.Module):
    """Patches as tokens after a class token, with learned positions."""

    side: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (self.side, self.side), self.side)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        start = nn.initializers.normal(0.02)
        first = self.param("first", start, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)
        return x + self.param("positions", start, (1, *x.shape[1:]))


def _attend(config, x, train, width):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(config.heads)(y, y)
    y = nn.Dense(4 * width)(nn.LayerNorm()(x))
    return x + nn.Dense(width)(nn.gelu(y))


_LAYERS = {
    "conv": _conv,
    "pool": _pool,
    "up": _up,
    "block": _block,
    "patches": lambda config, x, train, width: _Patches(config.patch, width)(x),
    "attend": _attend,
    "relu": lambda config, x, train: nn.relu(x),
    "flat": lambda config, x, train: x.reshape(x.shape[0], -1),
    "mean": lambda config, x, train: jnp.mean(x, axis=(1, 2)),
    "first": lambda config, x, train: nn.LayerNorm()(x)[:, 0],
    "dense": lambda config, x, train, width: nn.relu(nn.Dense(width)(x)),
    "dropout": lambda config, x, train: nn.Dropout(config.dropout)(x, not train),
}


def layers_of(config: Any) -> tuple[tuple, tuple, tuple]:
    """The layers of the three parts."""

    def w(width):
        return max(1, round(width * config.width))

    def convs(*widths):
        return tuple(("conv", w(width)) for width in widths)

    pool = (("pool",),)
    if config.family == "mlp":
        return (("flat",), ("dense", w(512))), (("dense", w(128)),), ()
    if config.family == "cnn":
        two = [(*convs(a), *pool, *convs(b), *pool) for a, b in ((32, 64), (128, 256))]
        last = ("flat",), ("dense", w(1024)), ("dropout",)
        return two[0], two[1], last
    if config.family == "vgg16":
        return (
            (*convs(64, 64), *pool, *convs(128, 128), *pool),
            (*convs(256, 256, 256), *pool, *convs(512), ("conv", w(512), 3, 1, False)),
            (("relu",), *convs(512), *pool, *convs(512, 512, 512), *pool, ("flat",)),
        )
    if config.family == "resnet18":
        first = convs(64)
        if config.stem == "imagenet":
            first = ("conv", w(64), 7, 2), ("pool", 3, 2, 1)

        def stage(width, stride):
            return ("block", w(width), stride), ("block", w(width), 1)

        return (
            (*first, *stage(64, 1), *stage(128, 2)),
            stage(256, 2),
            (*stage(512, 2), ("mean",)),
        )
    if config.family == "translator":
        down = tuple(("conv", w(width), 4, 2) for width in (32, 64, 128))
        up = ("up", w(64), False), ("up", w(32), False), ("up", config.shape[2], True)
        body = tuple(x for each in convs(64, 128, 256) for x in (each, ("pool",)))
        return down, up, (*body, ("flat",), ("dense", w(512)), ("dropout",))
    width = w(192) // config.heads * config.heads
    blocks = (("attend", width),) * config.depth
    return (("patches", width), *blocks[:2]), (*blocks[2:], ("first",)), ()
