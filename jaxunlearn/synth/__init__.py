# SPDX-License-Identifier: Apache-2.0
"""Synthesis: functions from data to data that use a model.

Experimental: names and behaviour may change in any release.

| name | result |
| --- | --- |
| `kmeans_per_class` | a bucket for every image: its cluster within its class |
| `condense` | one image per bucket: a weighted sum of its images |
| `invert` | one image per bucket: drawn by a generator (model inversion) |
| `reduce_retain` | the retain set; buckets without forgotten images are condensed |
| `fit_gans`, `draw_images` | a generator and a discriminator per stream; images |
| `pseudo_label` | images with the labels that a model predicts |
| `invert_labels`, `build_mixture` | wrong labels; the training set of multi-GAN |

    features = ...                              # [n, D], models.vision.features
    buckets = synth.kmeans_per_class(features, labels, num_clusters=450, key=key)
    condensed = synth.condense(model, params, table, features, buckets)
    reduced = synth.reduce_retain(table, buckets, condensed, forget_rows)

Condensation runs once, before any forget request; the reduction runs for each request.
References: Khan 2024, https://arxiv.org/abs/2402.00195; Hatua, Nguyen and Sung 2024,
https://arxiv.org/abs/2407.18467
"""

from jaxunlearn.synth._clusters import kmeans_per_class
from jaxunlearn.synth._condense import Condensed, condense
from jaxunlearn.synth._gan import Diverged, GanTerm, draw_images, fit_gans
from jaxunlearn.synth._invert import invert
from jaxunlearn.synth._reduce import Reduced, reduce_retain
from jaxunlearn.synth._relabel import (
    SOURCES,
    build_mixture,
    invert_labels,
    pseudo_label,
)

__all__ = [
    "SOURCES",
    "Condensed",
    "Diverged",
    "GanTerm",
    "Reduced",
    "build_mixture",
    "condense",
    "draw_images",
    "fit_gans",
    "invert",
    "invert_labels",
    "kmeans_per_class",
    "pseudo_label",
    "reduce_retain",
]
