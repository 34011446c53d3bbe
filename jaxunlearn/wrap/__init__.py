# SPDX-License-Identifier: Apache-2.0
"""Wrappers: from a Model to a Model with additional parameters.

| name | gives |
| --- | --- |
| `lora` | a Model whose chosen kernels have low-rank products added |
| `add_lora` | params with fresh low-rank leaves |
| `merge_lora` | plain params, with the products added to the kernels |
| `LORA` | the pattern of the low-rank leaves, for `trees.split` |
| `projection` | a Model that removes directions from values at chosen layers |
| `add_projection` | params with a new task's directions; earlier ones are constant |
| `fold_projection` | plain params, where folding into kernels is exact |
| `projection_sites` | the sites and layers of such a Model |
| `projection_basis` | an orthonormal basis of all removed directions |
| `initial_directions` | initial values of directions: PCA or contrast of moments |
| `augment` | a Model that shifts and mirrors images during training |
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
