# SPDX-License-Identifier: Apache-2.0
"""K-means by class, on features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.typing import Array, PRNGKey


def kmeans_per_class(
    features: Array, labels: Array, *, clusters: int, key: PRNGKey, steps: int = 50
) -> np.ndarray:
    """The bucket of every row: label * clusters + its cluster among rows of that label.

    Lloyd's algorithm from k-means++ seeds, class by class, in float32. A cluster that
    loses all its rows keeps its centre; its bucket is then empty.

    Args:
        features: [n, D] float, such as models.vision.features.
        labels: [n] int >= 0.
        clusters: K, for every class; at most the rows of the smallest.
        key: of the seeds.
        steps: at most so many steps; it ends where nothing changes.
    Returns:
        [n] int32.
    Raises:
        ValueError: if a class has fewer rows than clusters, there is no row, a feature
            is not finite or a label below 0. TypeError: for labels that are not whole.
    """
    owner = "kmeans_per_class"
    _checks.positive_int(owner, clusters=clusters, steps=steps)
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or not len(labels) or len(features) != len(labels):
        raise ValueError(
            f"{owner} needs features [n, D] and labels [n], n >= 1, got shapes "
            f"{features.shape} and {labels.shape}."
        )
    _checks.whole(owner, labels=labels)
    if not np.isfinite(features).all() or labels.min() < 0:
        raise ValueError(
            f"{owner} needs finite features and labels >= 0, got "
            f"{int((~np.isfinite(features)).sum())} not finite and a least label of "
            f"{labels.min()}. Look at the params and the images."
        )
    found, counts = np.unique(labels, return_counts=True)
    if counts.min() < clusters:
        raise ValueError(
            f"{owner} needs at least {clusters} rows in every class, got "
            f"{counts.min()} in class {found[counts.argmin()]}. Ask for fewer clusters."
        )
    most = int(counts.max())
    buckets = np.empty(len(labels), np.int32)
    for label, count in zip(found.tolist(), counts.tolist(), strict=True):
        rows = np.flatnonzero(labels == label)
        points = np.zeros((most, features.shape[1]), np.float32)
        points[:count] = features[rows]
        real = np.arange(most) < count
        class_key = jax.random.fold_in(key, label)
        nearest = _kmeans(points, real, class_key, clusters, steps)
        buckets[rows] = label * clusters + np.asarray(nearest)[:count]
    return buckets


@partial(jax.jit, static_argnums=(3, 4))
def _kmeans(points, real, key, clusters, steps):
    """The cluster [n] of every point; points that are not real count nowhere."""
    here = real.astype(jnp.float32)
    centres = _seeds(points, here, key, clusters)

    def go_on(carry):
        _, _, changed, step = carry
        return changed & (step < steps)

    def move(carry):
        centres, nearest, _, step = carry
        member = jax.nn.one_hot(nearest, clusters) * here[:, None]
        size = member.sum(0)[:, None]
        mean = (member.T @ points) / jnp.maximum(size, 1)
        centres = jnp.where(size > 0, mean, centres)
        new = _nearest(points, centres)
        return centres, new, jnp.any((new != nearest) & real), step + 1

    start = (centres, _nearest(points, centres), jnp.bool_(True), jnp.int32(0))
    return jax.lax.while_loop(go_on, move, start)[1]


def _seeds(points, here, key, clusters):
    """K-means++: each next centre a point drawn by its squared distance to those."""

    def draw(draw_key, weights):
        return points[jax.random.categorical(draw_key, jnp.log(weights))]

    keys = jax.random.split(key, clusters)
    first = draw(keys[0], here)
    distance = here * jnp.sum((points - first) ** 2, axis=1)

    def add(distance, draw_key):
        # Points that are all alike leave no distance: then any real one is taken.
        weights = jnp.where(distance.sum() > 0, distance, here)
        centre = draw(draw_key, weights)
        new = here * jnp.sum((points - centre) ** 2, axis=1)
        return jnp.minimum(distance, new), centre

    _, others = jax.lax.scan(add, distance, keys[1:])
    return jnp.concatenate([first[None], others])


def _nearest(points, centres):
    squares = jnp.sum(centres**2, axis=1)
    return jnp.argmin(squares - 2 * points @ centres.T, axis=1).astype(jnp.int32)
