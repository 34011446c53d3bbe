# SPDX-License-Identifier: Apache-2.0
"""Fast distribution matching: a bucket's images blended into one like them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import _checks, _pixels
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Array, Model, Params


class Condensed(NamedTuple):
    """A table of one image a bucket.

    Attributes:
        table: `image` [k, H, W, C] float32 (a blend may leave [0, 1] a little),
            `tokens` and `mask` as of other images; labels are the buckets' classes.
        buckets: [k] int, the bucket of each image, rising; empty ones have none.
        losses: [k] float32, the last value of what was minimised.
    """

    table: tables.Table
    buckets: np.ndarray
    losses: np.ndarray


def condense(
    model: Model,
    params: Params,
    table: tables.Table,
    features: Array,
    buckets: np.ndarray,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    most: int = 1024,
) -> Condensed:
    """One image for each bucket, a weighted sum of its images whose features match.

    For a bucket of images x_i with features phi the weights w, from 1 / N on, minimise

        || (1/N) sum_i phi(x_i) - phi(sum_i w_i x_i) ||^2

    by Adam; w is neither normalised nor kept positive. Buckets are done many at a time,
    with the values that each would have alone, as Adam works entry by entry.

    Args:
        model: of models.vision, run without dropout and with its stored statistics.
        params: its parameters, trained.
        table: the images of all buckets.
        features: [n, D] float, the model's features of them.
        buckets: [n] int >= 0; all images of a bucket have one label.
        steps, lr: of Adam.
        most: images done at a time; as many as the largest bucket has, at least.
    Returns:
        The condensed images and their losses.
    Raises:
        ValueError: if the numbers of rows differ, labels within a bucket, a feature is
            not finite, or they are not as many as the model's; for images out of range.
        TypeError: for images of another dtype, or buckets that are not whole.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "synth.condense"
    _checks.positive_int(owner, steps=steps, most=most)
    _checks.positive(owner, learning_rate=learning_rate)
    labels = labels_of_buckets(owner, table, buckets)
    features = np.asarray(features, np.float32)
    if len(features) != len(buckets):
        raise ValueError(
            f"{owner} needs features of all {len(buckets)} images, got "
            f"{len(features)}. Run the model over the table."
        )
    one = {"image": table["image"][:1]}
    width = jax.eval_shape(model.apply, params, one).hidden.shape[-1]
    if features.shape[1:] != (width,):
        raise ValueError(
            f"{owner} needs features [n, {width}], as the model has, got shape "
            f"{features.shape}. Run the model over the table."
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"{owner} needs finite features, got {int((~np.isfinite(features)).sum())} "
            "that are not. Look at the params and the images."
        )
    names = np.array(sorted(labels), np.int64)
    order = np.argsort(buckets, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(np.asarray(buckets)[order])) + 1)
    image = np.asarray(table["image"])
    made = np.empty((len(names), *image.shape[1:]), np.float32)
    losses = np.empty(len(names), np.float32)
    # Groups of one size, so that one program does them all.
    groups, height, width = _groups([len(rows) for rows in members], most)
    for places in groups:
        rows = np.concatenate([members[place] for place in places])
        sizes = np.array([len(members[place]) for place in places])
        index, of = np.zeros(width, np.int64), np.full(width, height, np.int32)
        index[: len(rows)] = rows
        of[: len(rows)] = np.repeat(np.arange(len(places)), sizes)
        start = np.zeros(width, np.float32)
        start[: len(rows)] = np.repeat(1 / sizes, sizes)
        mean = np.zeros((height, features.shape[1]), np.float32)
        mean[: len(places)] = [features[members[place]].mean(0) for place in places]
        new, loss = _blend(
            params, image[index], of, start, mean, model, steps, learning_rate
        )
        made[places] = np.asarray(new)[: len(places)]
        losses[places] = np.asarray(loss)[: len(places)]
    return Condensed(one_a_bucket(made, labels, names), names, losses)


def one_a_bucket(
    made: np.ndarray, labels: dict[int, int], names: np.ndarray
) -> tables.Table:
    """A table of images, one of each bucket."""
    of = [labels[int(name)] for name in names]
    tokens = np.stack([np.zeros(len(of), np.int32), np.array(of, np.int32)], axis=1)
    return {"image": made, "tokens": tokens, "mask": np.ones(tokens.shape, bool)}


def labels_of_buckets(owner: str, table: tables.Table, buckets: Any) -> dict[int, int]:
    """Bucket -> label; raises unless images, and a bucket's have one label."""
    _pixels.check(owner, table)
    buckets, labels = np.asarray(buckets), np.asarray(table["tokens"])[:, 1]
    if buckets.shape != labels.shape:
        raise ValueError(
            f"{owner} needs a bucket for each of {len(labels)} images, got "
            f"{buckets.shape}. kmeans_per_class gives them."
        )
    _checks.whole(owner, buckets=buckets)
    if buckets.min() < 0:
        raise ValueError(
            f"{owner} needs buckets >= 0, got {buckets.min()}. kmeans_per_class gives "
            "them."
        )
    found: dict[int, int] = {}
    for bucket, label in zip(buckets.tolist(), labels.tolist(), strict=True):
        if found.setdefault(bucket, label) != label:
            raise ValueError(
                f"{owner} needs images of one class in a bucket, got labels "
                f"{found[bucket]} and {label} in bucket {bucket}."
            )
    return found


def _groups(sizes: list[int], most: int) -> tuple[list[np.ndarray], int, int]:
    """(places of the buckets done together, the most buckets and images of a group)."""
    width = max(most, *sizes)
    height = max(1, round(width * len(sizes) / sum(sizes)))
    groups, images = [[]], 0
    for place, size in enumerate(sizes):
        if images + size > width or len(groups[-1]) == height:
            groups, images = [*groups, []], 0
        groups[-1].append(place)
        images += size
    width = min(width, sum(sizes))
    return [np.array(group) for group in groups], min(height, len(sizes)), width


def _blend(params, image, of, weights, mean, model, steps, learning_rate):
    """Blends [b, H, W, C] of images [n, H, W, C] that belong `of` a bucket each (b: of
    none), and their losses [b]; `weights` [n] to start from."""
    image, state = _floats(image), optax.adam(learning_rate).init(weights)
    of, mean = jax.device_put((of, mean))
    for _ in range(steps):
        weights, state = _step(
            weights, state, params, image, of, mean, model, learning_rate
        )
    return _found(weights, params, image, of, mean, model)


@jax.jit
def _floats(image):
    return _pixels.as_float("synth.condense", image)


# A program a step: convolutions in a loop of XLA's take a CPU several times longer.
@partial(jax.jit, static_argnums=(6, 7), donate_argnums=(0, 1))
def _step(weights, state, params, image, of, mean, model, learning_rate):
    def loss(weights):
        return jnp.sum(_found(weights, params, image, of, mean, model)[1])

    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(weights), state)
    return optax.apply_updates(weights, updates), state


@partial(jax.jit, static_argnums=5)
def _found(weights, params, image, of, mean, model):
    """The blends of images weighted so, and how far each one's features are."""
    weighted = weights[:, None, None, None] * image
    blends = jax.ops.segment_sum(weighted, of, num_segments=len(mean))
    features = model.apply(params, {"image": blends}).hidden[:, 0]
    return blends, jnp.sum((mean - features) ** 2, axis=1)
