# SPDX-License-Identifier: Apache-2.0
"""Wrappers: a Model in, a Model out, with parameters beside those it had.

| name | gives |
| --- | --- |
| `lora` | a Model whose chosen kernels have low-rank products added |
| `add_lora` | params with fresh low-rank leaves |
| `merge_lora` | plain params again, the products added to the kernels |
| `LORA` | the pattern of those leaves, for `trees.split` |
| `projection` | a Model that takes directions away from values at chosen layers |
| `add_projection` | params with a task's directions, those of earlier tasks constant |
| `fold_projection` | plain params again, where the fold into kernels is exact |
| `projection_sites` | the sites and layers of such a Model |
| `projection_basis` | an orthonormal basis of all that is taken away |
| `initial_directions` | where a task's directions begin: PCA or contrast of moments |
| `augment` | a Model that shifts and mirrors images while it trains |
| `PROJECTION` | the pattern of the directions that train, for `trees.split` |
"""

from jaxunlearn.wrap._augment import augment
from jaxunlearn.wrap._directions import initial_directions
from jaxunlearn.wrap._lora import LORA, add_lora, lora, merge_lora
from jaxunlearn.wrap._projection import (
    PROJECTION,
    add_projection,
    fold_projection,
    projection,
    projection_basis,
    projection_sites,
)

__all__ = [
    "LORA",
    "PROJECTION",
    "add_lora",
    "add_projection",
    "augment",
    "initial_directions",
    "fold_projection",
    "lora",
    "merge_lora",
    "projection_sites",
    "projection",
    "projection_basis",
]
