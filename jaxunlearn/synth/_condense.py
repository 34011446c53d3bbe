# SPDX-License-Identifier: Apache-2.0
"""Fast distribution matching: one image per bucket, a weighted sum of its images."""

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
    """A table with one image per bucket.

    Attributes:
        table: `image` [k, H, W, C] float32 (values may be slightly outside [0, 1]), and
            `tokens` and `mask` as in other image tables; labels are the buckets'
            classes.
        buckets: [k] int, the bucket of each image, increasing, without empty buckets.
        losses: [k] float32, the final value of the objective.
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
    batch_size: int = 1024,
) -> Condensed:
    """Condenses each bucket to one image: a weighted sum with the mean features.

    For a bucket of N images x_i with features phi, the weights w, initially 1 / N,
    minimise

        || (1/N) sum_i phi(x_i) - phi(sum_i w_i x_i) ||^2

    by Adam; w is neither normalised nor constrained to be positive. Several buckets are
    optimised at a time; each has the values it would have alone, because Adam works
    entry by entry.

    Args:
        model: of models.vision, run without dropout and with its stored statistics.
        params: its trained parameters.
        table: the images of all buckets.
        features: [n, D] float, the model's features of the images.
        buckets: [n] int >= 0; all images of a bucket have the same label.
        steps: number of updates of Adam.
        learning_rate: of Adam.
        batch_size: number of images at a time; at least the size of the largest bucket
            is used.
    Returns:
        The condensed images and their losses.
    Raises:
        ValueError: if the numbers of rows differ, a bucket has two labels, a feature is
            not finite, the width of the features is not that of the model, or pixels
            are out of range. TypeError: if images have another dtype, or buckets are
            not integers.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    owner = "synth.condense"
    _checks.positive_int(owner, steps=steps, batch_size=batch_size)
    _checks.positive(owner, learning_rate=learning_rate)
    labels = labels_of_buckets(owner, table, buckets)
    features = np.asarray(features, np.float32)
    if len(features) != len(buckets):
        raise ValueError(
            f"{owner} needs features of all {len(buckets)} images, got "
            f"{len(features)}. Use models.vision.features."
        )
    one = {"image": table["image"][:1]}
    width = jax.eval_shape(model.apply, params, one).hidden.shape[-1]
    if features.shape[1:] != (width,):
        raise ValueError(
            f"{owner} needs features [n, {width}], as the model gives, got shape "
            f"{features.shape}. Use models.vision.features."
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"{owner} needs finite features, got {int((~np.isfinite(features)).sum())} "
            "others. Check the params and the images."
        )
    names = np.array(sorted(labels), np.int64)
    order = np.argsort(buckets, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(np.asarray(buckets)[order])) + 1)
    image = np.asarray(table["image"])
    made = np.empty((len(names), *image.shape[1:]), np.float32)
    losses = np.empty(len(names), np.float32)
    # Groups of buckets with one shape, so that one compiled program serves all.
    groups, height, width = _groups([len(rows) for rows in members], batch_size)
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
    """A table of one image per bucket; `names` are the buckets."""
    of = [labels[int(name)] for name in names]
    tokens = np.stack([np.zeros(len(of), np.int32), np.array(of, np.int32)], axis=1)
    return {"image": made, "tokens": tokens, "mask": np.ones(tokens.shape, bool)}


def labels_of_buckets(owner: str, table: tables.Table, buckets: Any) -> dict[int, int]:
    """bucket -> label; raises unless all images of each bucket have the same label."""
    _pixels.check(owner, table)
    buckets, labels = np.asarray(buckets), np.asarray(table["tokens"])[:, 1]
    if buckets.shape != labels.shape:
        raise ValueError(
            f"{owner} needs a bucket for each of {len(labels)} images, got shape "
            f"{buckets.shape}. Use kmeans_per_class."
        )
    _checks.integers(owner, buckets=buckets)
    if buckets.min() < 0:
        raise ValueError(
            f"{owner} needs buckets >= 0, got {buckets.min()}. Use kmeans_per_class."
        )
    found: dict[int, int] = {}
    for bucket, label in zip(buckets.tolist(), labels.tolist(), strict=True):
        if found.setdefault(bucket, label) != label:
            raise ValueError(
                f"{owner} needs images of one class in each bucket, got labels "
                f"{found[bucket]} and {label} in bucket {bucket}. Use kmeans_per_class."
            )
    return found


def _groups(sizes: list[int], batch_size: int) -> tuple[list[np.ndarray], int, int]:
    """(indices of the buckets of each group, max. buckets, max. images of a group)."""
    width = max(batch_size, *sizes)
    height = max(1, round(width * len(sizes) / sum(sizes)))
    groups, images = [[]], 0
    for index, size in enumerate(sizes):
        if images + size > width or len(groups[-1]) == height:
            groups, images = [*groups, []], 0
        groups[-1].append(index)
        images += size
    width = min(width, sum(sizes))
    return [np.array(group) for group in groups], min(height, len(sizes)), width


def _blend(params, image, of, weights, mean, model, steps, learning_rate):
    """(condensed images [b, H, W, C], losses [b]) of b buckets.

    `of` [n] is the bucket of each image [n, H, W, C], or b for padding; `weights` [n]
    are the initial weights; `mean` [b, D] the mean features.
    """
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


# One program per step: on CPUs, convolutions in an XLA loop are several times slower.
@partial(jax.jit, static_argnums=(6, 7), donate_argnums=(0, 1))
def _step(weights, state, params, image, of, mean, model, learning_rate):
    def loss(weights):
        return jnp.sum(_found(weights, params, image, of, mean, model)[1])

    updates, state = optax.adam(learning_rate).update(jax.grad(loss)(weights), state)
    return optax.apply_updates(weights, updates), state


@partial(jax.jit, static_argnums=5)
def _found(weights, params, image, of, mean, model):
    """(weighted sums of the images, squared distances of their features to `mean`)."""
    weighted = weights[:, None, None, None] * image
    blends = jax.ops.segment_sum(weighted, of, num_segments=len(mean))
    features = model.apply(params, {"image": blends}).hidden[:, 0]
    return blends, jnp.sum((mean - features) ** 2, axis=1)
