# SPDX-License-Identifier: Apache-2.0
"""Image classifiers as Models: a small CNN, MLP, VGG-16, ResNet-18, ViT, translator.

    model = models.vision.make(models.VisionConfig("cnn", shape=(32, 32, 3)))
    params = model.init(jax.random.key(0))
    train, rest = trees.split(params, models.vision.TRAINABLE)
    ...                                       # make_step, fit: as for language models
    params = models.vision.with_batch_stats(model, params, batches)

An image is a sequence of two tokens, the image and its label, and the label is the
answer: batches have `image` [B, H, W, C], `tokens` [B, 2] and `mask` [B, 2], as
data.images.table makes them. The last features take the place of a decoder's hidden
state before the answer, so terms, losses, recipes, metrics and attacks for language
models also work for image models.

A network has three parts, `begin`, `middle` and `final`, with the boundaries of the
condensation paper. In its condensed model, "translator", `begin` encodes an image,
`middle` decodes the code to another image, and `final` classifies that image.

Statistics of batch normalisation are leaves under `batch_stats`, which no term trains.
If `apply` gets a key, as terms pass it in training, the parts in `train_parts` use the
statistics of the batch, and dropout; otherwise the leaves are used. After training,
`with_batch_stats` measures the leaves again.

Over 400 lines because six small networks share one config and the same parts.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _pixels
from jaxunlearn.models import _vision_net
from jaxunlearn.typing import Array, Batch, Model, Outputs, Params, PRNGKey

PARTS = ("begin", "middle", "final")
TRAINABLE = r"(begin|middle|final)/.*"
"""Pattern of all leaves except the batch statistics, for trees.split."""

_STATS = "batch_stats"
FAMILIES = ("mlp", "cnn", "vgg16", "resnet18", "vit", "translator")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Settings of an image classifier.

    Attributes:
        family: one of FAMILIES; 8 must divide the sides for "translator".
        shape: (H, W, C) of an image, pixels.
        classes: number of classes.
        width: factor on the width of every layer; 1 is that of the paper.
        norm: "batch" or "none" after convolutions; None for that of the paper ("none"
            for VGG).
        stem: of ResNet: "cifar" (3x3 convolution, no pooling) or "imagenet" (7x7 with
            stride 2 and pooling, which the paper's code runs on 32 x 32 images).
        dropout: rate before the head of the CNN and of the translator.
        depth, heads, patch: of the ViT: number of blocks, number of attention heads,
            side of a patch in pixels.
        mean, std: pixels in [0, 1] become (pixel - mean) / std; one number, or one per
            channel.
    """

    family: str = "cnn"
    shape: tuple[int, int, int] = (32, 32, 3)
    classes: int = 10
    width: float = 1.0
    norm: str | None = None
    stem: str = "cifar"
    dropout: float = 0.5
    depth: int = 12
    heads: int = 3
    patch: int = 4
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)


def make(config: VisionConfig, *, train_parts: Sequence[str] = PARTS) -> Model:
    """The network that a config describes.

    Args:
        config: the settings.
        train_parts: parts that use batch statistics and dropout when `apply` gets a
            key. Name the parts that train, so that a frozen part stays the same
            function.
    Returns:
        A Model, the same one for equal arguments, so that programs compiled for it run
        again. `apply` returns features as hidden [B, 2, D], those of the image first;
        its only tap, "statistics", is the batch statistics of the parts that used the
        batch. `unembed` returns logits of the classes.
    Raises:
        ValueError: for an unknown family, norm, stem or part, or a shape that is too
            small or not divisible. `apply` raises ValueError for images of another
            shape and TypeError for another dtype.
    """
    owner = "vision.make"
    _checks.one_of(owner, FAMILIES, family=config.family)
    _checks.one_of(owner, (None, "batch", "none"), norm=config.norm)
    _checks.one_of(owner, ("cifar", "imagenet"), stem=config.stem)
    _checks.positive(owner, width=config.width)
    for part in train_parts:
        _checks.one_of(owner, PARTS, train_parts=part)
    min_side = {"vgg16": 32, "cnn": 16}.get(config.family, 1)
    if min(config.shape[:2]) < min_side:
        raise ValueError(
            f"{owner} needs images of at least {min_side} x {min_side} pixels for "
            f"{config.family!r}, got shape={config.shape}. Pad them, or use 'mlp'."
        )
    if config.family == "translator" and any(x % 8 for x in config.shape[:2]):
        raise ValueError(
            f"{owner} needs sides that 8 divides for 'translator', got "
            f"shape={config.shape}. Pad the images."
        )
    return _make(config, tuple(train_parts))


@functools.lru_cache(maxsize=64)
def _make(config, train_parts):
    net = _vision_net.Net(config)

    def init(key: PRNGKey) -> Params:
        image = jnp.zeros((1, *config.shape), jnp.float32)
        variables = dict(net.init(key, image, (), method="logits"))
        stats = {_STATS: variables[_STATS]} if _STATS in variables else {}
        return {**variables["params"], **stats}

    def apply(
        params: Params,
        batch: Batch,
        *,
        taps: Mapping | None = None,
        edits: Mapping | None = None,
        until: int | None = None,
        key: PRNGKey | None = None,
    ) -> Outputs:
        if edits or until is not None or set(taps or ()) - {"statistics"}:
            raise ValueError(
                "An image model needs taps=None or the tap 'statistics', and neither "
                f"edits nor until, got taps={sorted(taps or ())}, "
                f"edits={sorted(edits or ())}, until={until}."
            )
        image = _normalised(config, batch)
        used = () if key is None else train_parts  # they use batch statistics
        out, new = net.apply(
            _variables(params),
            image,
            used,
            mutable=[_STATS],
            rngs=None if key is None else {"dropout": key},
            method="features",
        )
        stats = {part: x for part, x in new.get(_STATS, {}).items() if part in used}
        tapped = {"statistics": stats} if taps else {}
        return Outputs(jnp.stack([out, jnp.zeros_like(out)], axis=1), tapped)

    def unembed(params: Params, hidden: Array) -> Array:
        head = params["final"]["head"]
        logits = hidden @ head["kernel"].astype(hidden.dtype)
        return (logits + head["bias"].astype(hidden.dtype)).astype(jnp.float32)

    return Model(init, apply, unembed, {}, config)


def features(model: Model, params: Params, batch: Batch) -> Array:
    """The features [B, D] that the classification head reads, without dropout."""
    return model.apply(params, batch).hidden[:, 0]


def with_batch_stats(
    model: Model, params: Params, batches: Iterable[Batch], key: PRNGKey | None = None
) -> Params:
    """Params with the batch normalisation statistics measured on these batches.

    The statistics are averages over the batches of each channel's mean and mean square,
    with the model's `train_parts` normalising by the batch, as in training. Running
    averages of other libraries estimate the same. Leaves of other parts do not change.

    Args:
        model: from `make`.
        params: its parameters, statistics included.
        batches: batches of equal size of the data to retain. Statistics of forgotten
            images would stay in the model.
        key: for dropout and augmentation; jax.random.key(0) if None.
    Returns:
        A tree like params.
    Raises:
        ValueError: if there are no batches.
    """
    if _STATS not in params:
        return params
    key = jax.random.key(0) if key is None else key

    total, count = None, 0
    for count, batch in enumerate(batches, 1):
        new = _batch_stats(params, dict(batch), jax.random.fold_in(key, count), model)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if not count:
        raise ValueError("with_batch_stats needs at least one batch, got none.")

    def divided(sums):
        mean = sums["mean"] / count
        var = sums["square"] / count - jnp.square(mean)
        return {"mean": mean, "var": jnp.maximum(var, 0)}  # rounding can make it < 0

    stats = jax.tree.map(divided, total, is_leaf=lambda x: "square" in x)
    return {**params, _STATS: {**params[_STATS], **stats}}


@partial(jax.jit, static_argnums=3)
def _batch_stats(params, batch, key, model):
    """Mean and mean square of the input of every batch normalisation."""
    taps = {"statistics": (0,)}
    found = model.apply(params, batch, taps=taps, key=key).taps["statistics"]
    return jax.tree.map(
        lambda s: {"mean": s["mean"], "square": s["var"] + jnp.square(s["mean"])},
        found,
        is_leaf=_is_norm,
    )


def _is_norm(node: Any) -> bool:
    return isinstance(node, Mapping) and set(node) == {"mean", "var"}


def _variables(params: Params) -> dict:
    found = {"params": {part: params[part] for part in PARTS}}
    if _STATS in params:
        found[_STATS] = jax.lax.stop_gradient(params[_STATS])
    return found


def _normalised(config: VisionConfig, batch: Batch) -> Array:
    """The batch's images, normalised, float32, after checking shape and dtype."""
    _checks.has_keys(
        "An image model", "columns", ("image",), batch, "data.images.table makes them."
    )
    image = batch["image"]
    if image.shape[1:] != tuple(config.shape) or image.ndim != 4:
        raise ValueError(
            f"An image model needs images [B, {', '.join(map(str, config.shape))}], "
            f"got shape {image.shape}. Set VisionConfig.shape, or resize the images."
        )
    mean, std = (jnp.asarray(x, jnp.float32) for x in (config.mean, config.std))
    return (_pixels.as_float("An image model", image) - mean) / std
