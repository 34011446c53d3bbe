# SPDX-License-Identifier: Apache-2.0
"""K-means clustering of features, separately for each class."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.typing import Array, PRNGKey


def kmeans_per_class(
    features: Array,
    labels: Array,
    *,
    num_clusters: int,
    key: PRNGKey,
    max_steps: int = 50,
) -> np.ndarray:
    """The bucket of every row: label * num_clusters + its cluster within its class.

    Lloyd's algorithm with k-means++ initialisation, for each class, in float32. A
    cluster that loses all rows keeps its centre; its bucket is then empty.

    Args:
        features: [n, D] float, such as models.vision.features.
        labels: [n] int >= 0.
        num_clusters: number of clusters per class; at most the size of the smallest
            class.
        key: draws the initial centres.
        max_steps: maximum number of iterations; it stops when no row changes cluster.
    Returns:
        [n] int32.
    Raises:
        ValueError: if a class has fewer rows than clusters, there is no row, a feature
            is not finite or a label is negative. TypeError: if labels are not integers.
    """
    owner = "kmeans_per_class"
    _checks.positive_int(owner, num_clusters=num_clusters, max_steps=max_steps)
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or not len(labels) or len(features) != len(labels):
        raise ValueError(
            f"{owner} needs features [n, D] and labels [n], n >= 1, got shapes "
            f"{features.shape} and {labels.shape}."
        )
    _checks.integers(owner, labels=labels)
    if not np.isfinite(features).all() or labels.min() < 0:
        raise ValueError(
            f"{owner} needs finite features and labels >= 0, got "
            f"{int((~np.isfinite(features)).sum())} not finite and a smallest label of "
            f"{labels.min()}. Check the params and the images."
        )
    found, counts = np.unique(labels, return_counts=True)
    if counts.min() < num_clusters:
        raise ValueError(
            f"{owner} needs at least {num_clusters} rows in every class, got "
            f"{counts.min()} in class {found[counts.argmin()]}. Use fewer clusters."
        )
    max_rows = int(counts.max())  # classes are padded to one shape
    buckets = np.empty(len(labels), np.int32)
    for label, count in zip(found.tolist(), counts.tolist(), strict=True):
        rows = np.flatnonzero(labels == label)
        points = np.zeros((max_rows, features.shape[1]), np.float32)
        points[:count] = features[rows]
        real = np.arange(max_rows) < count
        class_key = jax.random.fold_in(key, label)
        nearest = _kmeans(points, real, class_key, num_clusters, max_steps)
        buckets[rows] = label * num_clusters + np.asarray(nearest)[:count]
    return buckets


@partial(jax.jit, static_argnums=(3, 4))
def _kmeans(points, real, key, clusters, steps):
    """The cluster [n] of every point; points that are not real are padding."""
    weights = real.astype(jnp.float32)
    centres = _initial_centres(points, weights, key, clusters)

    def unfinished(carry):
        _, _, changed, step = carry
        return changed & (step < steps)

    def move(carry):
        centres, nearest, _, step = carry
        member = jax.nn.one_hot(nearest, clusters) * weights[:, None]
        size = member.sum(0)[:, None]
        mean = (member.T @ points) / jnp.maximum(size, 1)
        centres = jnp.where(size > 0, mean, centres)
        new = _nearest(points, centres)
        return centres, new, jnp.any((new != nearest) & real), step + 1

    start = (centres, _nearest(points, centres), jnp.bool_(True), jnp.int32(0))
    return jax.lax.while_loop(unfinished, move, start)[1]


def _initial_centres(points, weights, key, clusters):
    """K-means++: draws each centre with probability proportional to the squared
    distance to the nearest centre so far."""

    def draw(draw_key, scores):
        return points[jax.random.categorical(draw_key, jnp.log(scores))]

    keys = jax.random.split(key, clusters)
    first = draw(keys[0], weights)
    distance = weights * jnp.sum((points - first) ** 2, axis=1)

    def add(distance, draw_key):
        # If all distances are 0, any real point is drawn.
        scores = jnp.where(distance.sum() > 0, distance, weights)
        centre = draw(draw_key, scores)
        new = weights * jnp.sum((points - centre) ** 2, axis=1)
        return jnp.minimum(distance, new), centre

    _, others = jax.lax.scan(add, distance, keys[1:])
    return jnp.concatenate([first[None], others])


def _nearest(points, centres):
    squares = jnp.sum(centres**2, axis=1)
    return jnp.argmin(squares - 2 * points @ centres.T, axis=1).astype(jnp.int32)
