# SPDX-License-Identifier: Apache-2.0
"""Synthesis: data in, data out, by way of a model.

| name | gives |
| --- | --- |
| `kmeans_per_class` | a bucket for every image: its cluster among those of its class |
| `condense` | one image a bucket, a blend of its images (fast distribution matching) |
| `invert` | one image a bucket, drawn by a generator (model inversion) |
| `reduce_retain` | the retain set, condensed wherever no forgotten image was in it |

    features = ...                              # [n, D], models.vision.features
    buckets = synth.kmeans_per_class(features, labels, clusters=450, rng=rng)
    small = synth.condense(model, params, table, features, buckets)
    reduced = synth.reduce_retain(table, buckets, small, forget_rows)

Condensation is done once, before anything is to be forgotten; the reduction each time.
References: Khan 2024, https://arxiv.org/abs/2402.00195
"""

from jaxunlearn.synth._clusters import kmeans_per_class
from jaxunlearn.synth._condense import Condensed, condense
from jaxunlearn.synth._invert import invert
from jaxunlearn.synth._reduce import Reduced, reduce_retain

__all__ = [
    "Condensed",
    "Reduced",
    "condense",
    "invert",
    "kmeans_per_class",
    "reduce_retain",
]
