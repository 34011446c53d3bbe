# SPDX-License-Identifier: Apache-2.0
"""Synthesis: data in, data out, by way of a model.

| name | gives |
| --- | --- |
| `kmeans_per_class` | a bucket for every image: its cluster among those of its class |
| `condense` | one image a bucket, a blend of its images (fast distribution matching) |
| `invert` | one image a bucket, drawn by a generator (model inversion) |
| `reduce_retain` | the retain set, condensed wherever no forgotten image was in it |
| `fit_gans`, `draw_images` | a generator and a discriminator a stream; their images |
| `pseudo_label` | images with the labels that a model gives them |
| `invert_labels`, `build_mixture` | other labels; the mix that the multi-GAN method fits |

    features = ...                              # [n, D], models.vision.features
    buckets = synth.kmeans_per_class(features, labels, clusters=450, key=key)
    small = synth.condense(model, params, table, features, buckets)
    reduced = synth.reduce_retain(table, buckets, small, forget_rows)

Condensation is done once, before anything is to be forgotten; the reduction each time.
References: Khan 2024, https://arxiv.org/abs/2402.00195; Hatua, Nguyen and Sung 2024,
https://arxiv.org/abs/2407.18467
"""

from jaxunlearn.synth._clusters import kmeans_per_class
from jaxunlearn.synth._condense import Condensed, condense
from jaxunlearn.synth._gan import GAN_LOSSES, Diverged, GanTerm, draw_images, fit_gans
from jaxunlearn.synth._invert import invert
from jaxunlearn.synth._reduce import Reduced, reduce_retain
from jaxunlearn.synth._relabel import (
    RULES,
    SOURCES,
    build_mixture,
    invert_labels,
    pseudo_label,
)

__all__ = [
    "GAN_LOSSES",
    "RULES",
    "SOURCES",
    "Condensed",
    "Diverged",
    "GanTerm",
    "Reduced",
    "condense",
    "draw_images",
    "fit_gans",
    "invert",
    "invert_labels",
    "kmeans_per_class",
    "pseudo_label",
    "reduce_retain",
    "build_mixture",
]
